#!/bin/sh
# Creates the databases of Temporal in PostgreSQL, or upgrades their schema. It may run again at any time.
#
# POSTGRES_HOST, POSTGRES_USER and POSTGRES_PASSWORD_FILE say where and who. The programs and the schema are those of
# temporalio/admin-tools, whose version must be the server's.
set -eu
SQL_PASSWORD=$(cat "$POSTGRES_PASSWORD_FILE")
export SQL_PASSWORD

prepare() {
    database=$1 schema=$2
    sql="temporal-sql-tool --plugin postgres12 --ep $POSTGRES_HOST -p 5432 -u $POSTGRES_USER --db $database"
    $sql create
    # Of a database that has its schema it changes nothing.
    $sql setup-schema -v 0.0
    $sql update-schema -d "/etc/temporal/schema/postgresql/v12/$schema/versioned"
}

prepare temporal temporal
prepare temporal_visibility visibility
