"""Talk to language models, let them answer questions, and let a judge grade the answers.

model        a model that answers: a finished run, an adapter, or a pretrained model
session      a conversation in the terminal
questions    files of questions, in the form of MT-Bench
answers      files of answers, in FastChat's form
generation   answers questions, batch by batch
rows_file    a file of JSON lines that a kill cannot spoil
prompts      what a judge is asked, from prompts.yaml or a file of FastChat
grading      requests to a judge: ratings of single answers, comparisons of two
endpoint     the OpenAI-compatible server that runs the judge
ratings      mean ratings with bootstrap intervals
answers_page all answers side by side, as Markdown
"""
