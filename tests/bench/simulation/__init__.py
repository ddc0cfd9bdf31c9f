"""A fleet of hundreds of nodes that load one checkpoint at the same time, simulated: ``make simulate``.

Every decision is the daemon's own code's: whom a node listens to (``neighbours``), who reads the origin (``Readers``),
which group comes from where (``Assignment``). What is simulated is around it: links, latencies, deaths, and the loop
of ``pulling`` that feeds these decisions, with its constants and its rules.

What is simplified, each for a run of minutes:

- A link serves one group after another. A node has hundreds in flight, from dozens of others: that comes to equal
  shares of a link, and costs one event for each group. Nothing between the nodes' own links is a bottleneck.
- A group is a unit of ``group_bytes``, coarser than the daemon's 8 MiB. How many are asked for at once is scaled, so
  that it is as many bytes; events are counted as for groups of 8 MiB.
- A node looks at its events every 20 ms; what it says goes to all who listen at the same moment, every 50 ms.
- Hashing, planning and allocating take no time. Nodes start within ``starts`` seconds of each other.

Of the nodes that fail, every other one is killed, which its peers see at once; the rest vanish, which they have to find
out. Control traffic is HTTP bodies: the events as the daemon writes them, without the headers of TCP and TLS.
"""
