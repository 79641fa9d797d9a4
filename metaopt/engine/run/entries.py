"""Keys of the engine's own entries in a group that several modules use; most of them are in a checkpoint.

Those that modules below this one use are there: `PART` in `engine.chain`, `LR_SCALE` and `LR_FACTOR` in
`scheduled_values`, those of settings in `group_entries`.
"""

# group entries of the engine: the count of updates is the run's, the same in every group
UPDATES = "metaopt.updates"
# the length of the run, None if it was not given
TOTAL_STEPS = "metaopt.total_steps"
# the labels of the wrappers that act on the group: the state of a part without hyperparameters is known as its by this
LABELS = "metaopt.labels"
# the label of the average that the parameters hold now, or "" (a key of old, kept for checkpoints)
AVERAGE_SHOWN = "metaopt.swapped"
# "", or the state holds only placeholders (see param_state): "asked" and the group entries that the base adds, if a
# client wants to see the keys; "made" in a checkpoint from before the base's first update
TEMPLATE = "metaopt.template"
# where in `Run.own_schedules` those of this group are; a group that follows the stack's schedules has no such entry
OWN_SCHEDULES = "metaopt.own_schedules"
# the rate that a group was built with, None under a schedule: a client that changes the rate later has not asked for
# another setting
BUILT_LR = "metaopt.built_lr"
# in how many calls of `step()` the base was stepped or the update skipped, if wrappers exchange means over replicas:
# all replicas make the same; `flush()` counts on to the end of the round. Alone, as many as the updates need
STEP_CALLS = "metaopt.steps"
# the version of a checkpoint's format; one without this entry has format 1 (docs/upgrading.md)
FORMAT_KEY, FORMAT = "metaopt.format", 2
