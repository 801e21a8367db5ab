"""The paper's comparison and what goes beyond it: experiments as folders, a grid of runs, one result file each.

Run the experiments:

    experiment_files  experiment.yaml -> an experiment
    experiment        an experiment -> the settings of each run
    grid              works off the runs
    cell_run          one run, in a process of its own
    locks             who does which run
    progress          what is printed meanwhile
    runs              the content of a result file
    stored_results    the results folder of a study
    answers           answers of the trained models to questions

Read the results:

    results           result files -> runs
    sections          runs -> what is compared with each other
    statistics        means, spreads, differences and their uncertainty

Write the report:

    report            a page, Markdown, CSV
    contents          what a report says
    answer            the answer that it begins with
    verdict           the outcome of a section in sentences
    overview          tables about the study as a whole
    tables            scores, comparisons, searches, runs (cost_tables: time, memory, size)
    table             one table as text
    plots             plots as SVG
    page              the HTML page
    run_card          details of one run
    labels            names of runs that differ by a setting
"""
