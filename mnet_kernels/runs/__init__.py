"""Several layers in one call: a *run* of a model's layers, or a depthwise + 1x1 *pair* inside one.

Which layers make a run is found by swap/find_runs.py and written down as stages.py has it;
runner.py calls it, from the forwards in forwards.py.
"""
