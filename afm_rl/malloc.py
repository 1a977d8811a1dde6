"""How glibc's allocator has to be set in a process that trains on CPU: values of GLIBC_TUNABLES, read when it starts.

XLA allocates a step's temporaries anew every step. By default glibc returns them to the system each time, and the next step
pays for the same pages again. Huge pages make that cheaper; memory that stays in the process makes it free, at the price of
a process that gives nothing back while it trains.
"""

#: For every actor of one machine: huge pages alone.
ACTOR_TUNABLES = "glibc.malloc.hugetlb=1"
#: For a learner, whose steps come one after another. Without arena_max=1 threads other than the first have heaps of 64 MiB
#: and go back to mapping; top_pad makes the heap grow by whole huge pages.
LEARNER_TUNABLES = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", "mmap_max=0", "trim_threshold=68719476736", "arena_max=1", "top_pad=67108864")
)
