"""An S3 bucket through boto3: client, quick and resumed reads, ordered listing, errors."""
