"""How good a defence is: attacks, defences, tuning, robustness, and reports of it."""
