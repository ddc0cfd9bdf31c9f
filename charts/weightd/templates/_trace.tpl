{{/* What is traced, as a list; every entry says all. */}}
{{- define "weightd.traced" -}}
{{- $trace := .Values.trace -}}
{{- $engine := .Values.engine -}}
{{- $models := $trace.models -}}
{{- if and (not $models) (eq .Values.mode "sidecar") $engine.model -}}
  {{- $models = list (dict "model" $engine.model "args" $engine.args) -}}
{{- end -}}
{{- $processor := $trace.processor | default (ternary "cpu" "" (eq (include "weightd.sharing" .) "none")) -}}
{{- $image := include "weightd.engineImage" . -}}
{{- $found := list -}}
{{- if $trace.enabled -}}
  {{- range $models -}}
    {{- $entry := dict "engine" $trace.engine "processor" $processor "stage" $trace.stage "image" $image "args" list -}}
    {{- range $name, $value := . }}{{ $_ := set $entry $name $value }}{{ end -}}
    {{- $found = append $found $entry -}}
  {{- end -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{/* Containers that give weightd the layouts, one after another, as items of `initContainers`. */}}
{{- define "weightd.tracers" -}}
{{- $root := . -}}
{{- $sidecar := eq .Values.mode "sidecar" -}}
{{- $env := list -}}
{{- range concat (include "weightd.engineEnv" . | fromYamlArray) .Values.engine.env -}}
  {{- if not (hasPrefix "NVIDIA_" .name) }}{{ $env = append $env . }}{{ end -}}
{{- end -}}
{{- if and .Values.engine.credentials (not $sidecar) }}{{ $env = concat $env (include "weightd.credentialsEnv" . | fromYamlArray) }}{{ end -}}
{{- /* Images for GPUs ask the runtime for all of them. */ -}}
{{- $env = append $env (dict "name" "NVIDIA_VISIBLE_DEVICES" "value" "void") -}}
{{- range $i, $model := include "weightd.traced" . | fromYamlArray }}
{{- $args := list "--engine" $model.engine "--processor" $model.processor "--timeout" (toString $root.Values.startup.timeoutSeconds) -}}
{{- if kindIs "map" $model.stage -}}
  {{- $args = concat $args (list "--stage" (include "weightd.text" (toJson $model.stage))) -}}
  {{- if or (not $sidecar) $root.Values.startup.wait }}{{ $args = append $args "--wait" }}{{ end -}}
{{- end }}
- name: weightd-trace-{{ $i }}
  image: {{ $model.image }}
  imagePullPolicy: {{ $root.Values.engine.image.pullPolicy }}
  command:
    {{- if $sidecar }}
    {{- /* An engine starts without it as well. */}}
    - /bin/sh
    - -c
    - python3 -m weightd.ipc.engines.ahead "$@" || echo "weightd-trace ended with exit code $?; the engine starts without it" >&2
    - weightd-trace
    {{- else }}
    - python3
    - -m
    - weightd.ipc.engines.ahead
    {{- end }}
  args:
    {{- toYaml (concat $args (list "--model" $model.model) $model.args) | nindent 4 }}
  env:
    {{- toYaml $env | nindent 4 }}
  {{- with $root.Values.engine.envFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $root.Values.trace.resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $root.Values.engine.securityContext }}
  securityContext:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    {{- include "weightd.engineVolumeMounts" $root | nindent 4 }}
    {{- if and $root.Values.engine.credentials (not $sidecar) }}{{ include "weightd.credentialsMounts" $root | nindent 4 }}{{ end }}
    {{- with $root.Values.engine.volumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
{{- end -}}
