"""The demo page: compare models, vote blindly and watch steering in a browser."""
