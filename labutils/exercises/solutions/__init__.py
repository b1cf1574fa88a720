"""The lab's own answers to the exercises, as they could stand in the cells of the notebooks."""
