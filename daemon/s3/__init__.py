"""The S3 endpoint: what is resident, as the objects that it was read from, for engines that know nothing of weightd."""
