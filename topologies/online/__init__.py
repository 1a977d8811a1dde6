"""The online loop (4.3.3): tickets, rollouts on disk, the group buffer, the producer of groups, and the loop itself."""
