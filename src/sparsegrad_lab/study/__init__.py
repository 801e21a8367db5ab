"""The paper's comparison and what goes beyond it: experiments as folders, a grid of runs, one result file each."""
