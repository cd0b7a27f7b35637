"""Evaluation of trained models: verification, template pooling, identification and rejection by confidence.

__main__     the command: python -m scf_fast.evaluation verify|ijb|identify|risk|report|table
comparison   several models on the same evaluations, by all ranks
evaluate     the evaluations: what each embeds and measures
datasets     files on disk -> checked data sets
alignment    loose crops and their landmarks -> aligned faces
embeddings   images -> features and log kappa or log variance, kept on disk
likelihoods  cosine, and the score and pooling of each density
pair_scores  the scores of many pairs
protocols    verification, templates, identification
quality      error versus reject, quality and known degradation
metrics      rates and curves over plain arrays
results      typed results, as results.json keeps them
tables       results -> tables
published_table  results -> the published table, in every form;  systems: the models that it compares
plots        figures
report       the report folder;  report_html: its page
"""
