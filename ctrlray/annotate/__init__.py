"""Human studies: pairs of a run's answers for raters to compare without knowing what was asked for, and what they agree with."""
