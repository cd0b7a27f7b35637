"""What a trained SCF model is worth: verification, template pooling, identification and rejection by kappa.

    metrics      rates and curves over plain arrays
    alignment    loose crops and their landmarks -> aligned faces
    datasets     files on disk -> checked data sets
    embeddings   images -> features and kappa, kept on disk -> scores of pairs
    protocols    what each protocol measures
    evaluate     the evaluations: what each embeds and makes of it
    report       tables, report.html, report.md, results.json
    plots        its figures

The command line is `python -m scf_fast.evaluation verify|ijb|identify|risk|report`.
"""
