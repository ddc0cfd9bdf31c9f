{{/* What a container runs that has weightd and the engine in it: sh -c THIS supervise COMMAND... */}}
{{- define "weightd.supervise" -}}
# weightd beside the engine, in one container. The engine is started again where it ends, the container ends with weightd.
# The volume of the sockets may be written to by others: clients are told whose daemon to believe.
export WEIGHTD_DAEMON_UID="$(id -u)"
weightd serve &
daemon=$!
engine=
stop() {
  trap '' TERM INT
  if [ -n "$engine" ]; then kill -TERM "$engine" 2>/dev/null; wait "$engine"; fi
  kill -TERM "$daemon" 2>/dev/null
  wait "$daemon"
  exit $?
}
trap stop TERM INT
runs() { kill -0 "$1" 2>/dev/null; }
# A shell hears signals while it waits for a child in the background, not for one in front.
pause() { sleep "$1" & wait $!; }
{{- if .Values.startup.wait }}
until weightd doctor --ready >/dev/null 2>&1; do
  runs "$daemon" || { wait "$daemon"; exit $?; }
  pause 1
done
{{- end }}
delay=1
while runs "$daemon"; do
  "$@" &
  engine=$!
  seconds=0
  while runs "$daemon" && runs "$engine"; do pause 1; seconds=$((seconds + 1)); done
  runs "$engine" && break
  wait "$engine"
  echo "supervise: the engine ended with exit code $? after $seconds s; starting it again in $delay s" >&2
  engine=
  pause "$delay"
  # One that ran for a while is not in a crash loop.
  if [ "$seconds" -ge 60 ]; then delay=1; elif [ "$delay" -lt 32 ]; then delay=$((delay * 2)); fi
done
if [ -n "$engine" ]; then kill -TERM "$engine" 2>/dev/null; wait "$engine"; fi
wait "$daemon"
code=$?
echo "supervise: weightd ended with exit code $code" >&2
exit "$code"
{{- end -}}
