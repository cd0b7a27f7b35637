"""What a trained SCF model is worth: verification, template pooling and rejection by kappa.

    metrics      accuracy, TAR at FAR, error versus reject, over plain arrays
    embeddings   images -> features and kappa -> scores of pairs
    protocols    what each protocol measures
    evaluate     everything above on one data folder; `python -m scf_fast.evaluation`
    report       tables, results.json, report.md
    plots        its figures
"""
