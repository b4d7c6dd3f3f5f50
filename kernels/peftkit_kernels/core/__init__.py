"""What all ops share: their declaration to torch (``op``), and launch plans (``plan``) that make a repeated call cheap."""
