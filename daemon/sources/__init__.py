"""Where bytes come from: files, object stores, hubs."""
