#!/bin/sh
# Creates the namespace of the suite and its search attributes, as far as they are missing. It may run again at any time.
#
# TEMPORAL_ADDRESS and TEMPORAL_NAMESPACE say where, and Temporal's other variables how to connect.
# RETENTION is the time for which jobs are kept after their end.
set -eu

describe() { temporal operator namespace describe --namespace "$TEMPORAL_NAMESPACE" > /dev/null 2>&1; }
describe || temporal operator namespace create --namespace "$TEMPORAL_NAMESPACE" --retention "${RETENTION:-168h}"

# A new namespace is known to all parts of the server after some seconds.
tries=0
until known=$(temporal operator search-attribute list --namespace "$TEMPORAL_NAMESPACE"); do
    tries=$((tries + 1))
    [ "$tries" -lt 30 ] || exit 1
    sleep 1
done

for attribute in \
    UserID=Keyword RequestID=Keyword Model=Keyword ProjectId=Keyword JobState=Keyword \
    TenantId=Keyword JobClass=Keyword LatencyMs=Int; do
    name=${attribute%=*}
    echo "$known" | grep -qw "$name" ||
        temporal operator search-attribute create --namespace "$TEMPORAL_NAMESPACE" --name "$name" --type "${attribute#*=}"
done
