"""What a policy acts in over several turns: `reset` gives the conversation, `step` answers each of its turns."""
