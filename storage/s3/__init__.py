"""An S3 bucket through boto3: client, resumed reads, ordered listing, errors."""
