"""How fast plait is at the sizes that people have, each figure a ratio to something that runs beside it in the same run.

``make bench`` runs everything; ``python -P -m benchmarks.speed --work DIR --out docs/results/speed --only WORD`` some of it. A file of
cases holds a function ``cases(work) -> list[Case]`` and stands in `__main__.SETS`; what the cases read is made once, by `inputs`.
"""
