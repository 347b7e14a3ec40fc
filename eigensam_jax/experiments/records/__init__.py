"""What a command writes, carries on and shows.

Every results file has one schema, whose version is `results.SCHEMA`; what it is stands
in notebooks/results/README.md.
"""
