"""What a command writes, carries on and shows.

Every results file has one schema, whose version is `results.SCHEMA`:

    schema       the version; a file of another is refused
    commands     the command lines that made it
    config       what all runs share
    trackers     how each tracker is made, where there are several
    versions     of Python and of the packages
    device       that it ran on
    complete     whether all runs are there
    wall_time_s  of all of them together
    runs         a list of records

A record is one training run (of `bench`, one optimizer on one network) and is flat: its
`seed` and `optimizer`, what else tells it from the others (`table`, `row`, `rho`,
`alpha`, `tracker`, `model`, `check`, ...), and its measures. `curves` holds a list for
each measure over the looks, among them `step`. Numbers have 9 digits, in curves 6.

Of the wings' own: `compare`, `accuracy` and `ablate` have a record a row and seed;
`tuning` tells those on the validation split. `track` has SAM at the radius of a run as
`sam_matched`. `sde` has paths, and checks of the equations against SAM, with `check`.
`spectrum` has one record. `bench` has its units too, a gradient and a product with the
Hessian, as `gradient` and `hvp` in the place of an optimizer.
"""
