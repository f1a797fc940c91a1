"""pyquant."""
