"""Airflow 3: every night, after the source was filled. The worker needs labelfleet installed.

Retries attach: a task that lost its worker follows the job that went on without it. 75 (another
cluster has the run) skips the task instead of failing it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    dag_id="labelfleet_cells",
    schedule="17 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,  # one run labels everything that has gathered
    max_active_runs=1,
) as dag:
    label = BashOperator(
        task_id="label",
        bash_command="labelfleet submit s3://plates/configs/cells.yaml --json",
        env={
            "RAY_API_SERVER_ADDRESS": "http://labelfleet-head-svc:8265",
            "RAY_AUTH_TOKEN_PATH": "/var/run/ray/auth_token",  # a mounted secret
        },
        append_env=True,
        skip_on_exit_code=75,
        retries=3,
        retry_delay=timedelta(minutes=5),
        execution_timeout=timedelta(hours=20),
    )
    verify = BashOperator(
        task_id="verify",
        bash_command="labelfleet verify s3://plates/labels/blood-cells",
        append_env=True,
    )
    label >> verify
