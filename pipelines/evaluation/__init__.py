"""How good labels are: mAP, confidence intervals, the audit."""
