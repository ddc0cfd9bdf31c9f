{{/* A value as the text of a variable. Numbers from values are floats, which Go writes as 1.073741824e+09 from a million on.
     Kubernetes expands $(NAME) in it, which here is never meant, and takes $$ for $. */}}
{{- define "weightd.text" -}}
{{- ternary . (toJson .) (kindIs "string" .) | replace "$" "$$" -}}
{{- end -}}

{{- define "weightd.anyAddress" -}}
{{- ternary "[::]" "0.0.0.0" (eq .Values.ipFamily "IPv6") -}}
{{- end -}}

{{/* A tensor-parallel map as a JSON object in the order in which its patterns count: a list's own, of a map the longest
     first. */}}
{{- define "weightd.orderedMap" -}}
{{- $entries := list -}}
{{- if kindIs "slice" . -}}
  {{- range . }}{{ range $pattern, $dim := . }}{{ $entries = append $entries (list $pattern $dim) }}{{ end }}{{ end -}}
{{- else -}}
  {{- $sortable := list -}}
  {{- range $pattern, $_ := . }}{{ $sortable = append $sortable (printf "%04d%s" (sub 1000 (len $pattern)) $pattern) }}{{ end -}}
  {{- $map := . -}}
  {{- range sortAlpha $sortable }}{{ $pattern := substr 4 -1 . }}{{ $entries = append $entries (list $pattern (get $map $pattern)) }}{{ end -}}
{{- end -}}
{{- $pairs := list -}}
{{- range $entries }}{{ $pairs = append $pairs (printf "%s:%s" (toJson (first .)) (toJson (last .))) }}{{ end -}}
{ {{- join "," $pairs -}} }
{{- end -}}

{{/* The stage requests as one line of JSON. */}}
{{- define "weightd.preload" -}}
{{- $requests := list -}}
{{- range .Values.preload -}}
  {{- $request := deepCopy . -}}
  {{- $map := get (.parallel | default dict) "map" -}}
  {{- if $map }}{{ $_ := set $request.parallel "map" "@map@" }}{{ end -}}
  {{- $json := toJson $request -}}
  {{- if $map }}{{ $json = replace "\"@map@\"" (include "weightd.orderedMap" $map) $json }}{{ end -}}
  {{- $requests = append $requests $json -}}
{{- end -}}
[{{ join "," $requests }}]
{{- end -}}

{{- define "weightd.peerDirectory" -}}
{{- $peers := .Values.peers -}}
{{- $name := include "weightd.fullname" . -}}
{{- if eq $peers.directory "dns" -}}
dns:{{ $name }}-peers.{{ .Release.Namespace }}.svc.{{ $peers.clusterDomain }}:{{ .Values.ports.peers }}
{{- else -}}
{{- $endpoints := join "," $peers.etcd.endpoints | trimSuffix "/" -}}
{{- /* The last endpoint may carry the prefix under which the fleet is kept. */ -}}
{{- $prefix := regexMatch "^https?://[^/]+$" (last (splitList "," $endpoints)) | ternary (printf "/weightd/%s/%s" .Release.Namespace $name) "" -}}
etcd:{{ $endpoints }}{{ $prefix }}
{{- end -}}
{{- end -}}

{{/* The settings as a list of variables. */}}
{{- define "weightd.settingsEnv" -}}
{{- $env := list -}}
{{- range $name, $value := .Values.settings -}}
  {{- if kindIs "map" $value -}}
    {{- $pairs := list -}}
    {{- range $device, $size := $value }}{{ $pairs = append $pairs (printf "%s=%s" $device (include "weightd.text" $size)) }}{{ end -}}
    {{- $value = join "," $pairs -}}
  {{- else if kindIs "slice" $value -}}
    {{- $items := list -}}
    {{- range $value }}{{ $items = append $items (include "weightd.text" .) }}{{ end -}}
    {{- $value = join "," $items -}}
  {{- else -}}
    {{- $value = include "weightd.text" $value -}}
  {{- end -}}
  {{- $env = append $env (dict "name" (printf "WEIGHTD_%s" (upper $name)) "value" $value) -}}
{{- end -}}
{{- toYaml $env -}}
{{- end -}}

{{/* The variables of `peers`. POD_IP has to come before those that expand it. */}}
{{- define "weightd.peersEnv" -}}
{{- $peers := .Values.peers -}}
{{- $address := ternary "[$(POD_IP)]" "$(POD_IP)" (eq .Values.ipFamily "IPv6") -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: WEIGHTD_PEERS
  value: {{ include "weightd.peerDirectory" . | quote }}
- name: WEIGHTD_PEER_LISTEN
  value: {{ printf "%s:%d" (include "weightd.anyAddress" .) (int .Values.ports.peers) | quote }}
- name: WEIGHTD_PEER_ADDRESS
  value: {{ printf "%s:%d" $address (int .Values.ports.peers) | quote }}
{{- if eq $peers.auth "token" }}
- name: WEIGHTD_PEER_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ $peers.token.existingSecret | default (printf "%s-peer-token" (include "weightd.fullname" .)) }}
      key: {{ $peers.token.key }}
{{- else }}
- name: WEIGHTD_PEER_TLS_CERT
  value: /etc/weightd/peer-tls/tls.crt
- name: WEIGHTD_PEER_TLS_KEY
  value: /etc/weightd/peer-tls/tls.key
- name: WEIGHTD_PEER_TLS_CA
  value: /etc/weightd/peer-tls/ca.crt
{{- end }}
{{- if eq $peers.directory "etcd" }}
{{- with $peers.etcd.existingSecret }}
- name: ETCDCTL_USER
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $peers.etcd.key }}}}
{{- end }}
{{- if $peers.etcd.tlsSecret }}
- name: ETCDCTL_CACERT
  value: /etc/weightd/etcd-tls/ca.crt
{{- if $peers.etcd.clientCertificate }}
- name: ETCDCTL_CERT
  value: /etc/weightd/etcd-tls/tls.crt
- name: ETCDCTL_KEY
  value: /etc/weightd/etcd-tls/tls.key
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The variables of `credentials`, by the names that each cloud's libraries know. */}}
{{- define "weightd.credentialsEnv" -}}
{{- $env := list -}}
{{- with .Values.credentials.s3 -}}
  {{- if .existingSecret -}}
    {{- $env = append $env (dict "name" "AWS_ACCESS_KEY_ID" "valueFrom" (dict "secretKeyRef" (dict "name" .existingSecret "key" .accessKeyIdKey))) -}}
    {{- $env = append $env (dict "name" "AWS_SECRET_ACCESS_KEY" "valueFrom" (dict "secretKeyRef" (dict "name" .existingSecret "key" .secretAccessKeyKey))) -}}
    {{- $env = append $env (dict "name" "AWS_SESSION_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" .existingSecret "key" "AWS_SESSION_TOKEN" "optional" true))) -}}
    {{- /* With keys at hand nobody has to ask the instance, whose answer on other clouds is a long silence. */ -}}
    {{- $env = append $env (dict "name" "AWS_EC2_METADATA_DISABLED" "value" "true") -}}
  {{- end -}}
  {{- if .region }}{{ $env = append $env (dict "name" "AWS_DEFAULT_REGION" "value" .region) }}{{ end -}}
  {{- if .endpoint -}}
    {{- $env = append $env (dict "name" "AWS_ENDPOINT_URL" "value" .endpoint) -}}
    {{- $env = append $env (dict "name" "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING" "value" "0") -}}
  {{- end -}}
{{- end -}}
{{- with .Values.credentials.gcs -}}
  {{- if .existingSecret }}{{ $env = append $env (dict "name" "GOOGLE_APPLICATION_CREDENTIALS" "value" (printf "/etc/weightd/gcs/%s" .key)) }}{{ end -}}
  {{- if .emulator }}{{ $env = append $env (dict "name" "CLOUD_STORAGE_EMULATOR_ENDPOINT" "value" .emulator) }}{{ end -}}
{{- end -}}
{{- with .Values.credentials.azure -}}
  {{- if .account }}{{ $env = append $env (dict "name" "AZURE_STORAGE_ACCOUNT_NAME" "value" .account) }}{{ end -}}
  {{- if .existingSecret -}}
    {{- $env = append $env (dict "name" "AZURE_STORAGE_ACCOUNT_KEY" "valueFrom" (dict "secretKeyRef" (dict "name" .existingSecret "key" .accountKeyKey))) -}}
  {{- end -}}
  {{- if .endpointSuffix }}{{ $env = append $env (dict "name" "AZURE_STORAGE_ENDPOINT_SUFFIX" "value" .endpointSuffix) }}{{ end -}}
{{- end -}}
{{- with .Values.credentials.hf -}}
  {{- if .existingSecret }}{{ $env = append $env (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" .existingSecret "key" .key))) }}{{ end -}}
  {{- if .endpoint }}{{ $env = append $env (dict "name" "HF_ENDPOINT" "value" .endpoint) }}{{ end -}}
{{- end -}}
{{- if or .Values.credentials.caBundle.configMap .Values.credentials.caBundle.secret -}}
  {{- /* S3 goes by the first, the other stores and httpx by the second; Azure's knows the mounted path only. */ -}}
  {{- $env = append $env (dict "name" "AWS_CA_BUNDLE" "value" "/etc/ssl/certs/ca-certificates.crt") -}}
  {{- $env = append $env (dict "name" "SSL_CERT_FILE" "value" "/etc/ssl/certs/ca-certificates.crt") -}}
{{- end -}}
{{- toYaml $env -}}
{{- end -}}

{{/* Who runs weightd, so that clients believe it: volumes of Kubernetes belong to root, and anybody may write to them.
     In the engine's container that is root where nothing says who; what runs there finds out by itself. */}}
{{- define "weightd.daemonUid" -}}
{{- if eq (include "weightd.sharing" .) "singleContainer" -}}
{{- dig "runAsUser" (dig "runAsUser" 0 .Values.podSecurityContext) .Values.engine.securityContext | int64 -}}
{{- else -}}
{{- .Values.securityContext.runAsUser | default 0 | int64 -}}
{{- end -}}
{{- end -}}

{{/* All variables of the daemon, as a list. */}}
{{- define "weightd.env" -}}
{{- $any := include "weightd.anyAddress" . -}}
{{- $cache := .Values.cache.path -}}
{{- $env := list (dict "name" "WEIGHTD_RUNTIME_DIR" "value" .Values.runtimeDir) -}}
{{- /* For the commands that are run in its container. */ -}}
{{- $env = append $env (dict "name" "WEIGHTD_DAEMON_UID" "value" (include "weightd.daemonUid" .)) -}}
{{- $env = append $env (dict "name" "WEIGHTD_CACHE_DIR" "value" $cache) -}}
{{- /* Beside the cache, because the root file system is read-only and engines read what lies there. */ -}}
{{- $env = append $env (dict "name" "HF_HOME" "value" (printf "%s/huggingface" $cache)) -}}
{{- $env = append $env (dict "name" "CUPY_CACHE_DIR" "value" (printf "%s/cupy" $cache)) -}}
{{- $env = append $env (dict "name" "CUDA_CACHE_PATH" "value" (printf "%s/cuda" $cache)) -}}
{{- $env = append $env (dict "name" "WEIGHTD_HEALTH_LISTEN" "value" (printf "%s:%d" $any (int .Values.ports.health))) -}}
{{- if .Values.metrics.enabled -}}
  {{- $env = append $env (dict "name" "WEIGHTD_METRICS_LISTEN" "value" (printf "%s:%d" $any (int .Values.ports.metrics))) -}}
{{- end -}}
{{- if .Values.s3.enabled -}}
  {{- $env = append $env (dict "name" "WEIGHTD_S3_LISTEN" "value" (printf "127.0.0.1:%d" (int .Values.ports.s3))) -}}
{{- end -}}
{{- if .Values.preload -}}
  {{- $env = append $env (dict "name" "WEIGHTD_PRELOAD" "value" (include "weightd.text" (include "weightd.preload" .))) -}}
{{- end -}}
{{- with .Values.apiToken -}}
  {{- if .existingSecret }}{{ $env = append $env (dict "name" "WEIGHTD_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" .existingSecret "key" .key))) }}{{ end -}}
{{- end -}}
{{- $env = concat $env (include "weightd.settingsEnv" . | fromYamlArray) -}}
{{- if .Values.peers.enabled }}{{ $env = concat $env (include "weightd.peersEnv" . | fromYamlArray) }}{{ end -}}
{{- $env = concat $env (include "weightd.credentialsEnv" . | fromYamlArray) -}}
{{- if eq (include "weightd.sharing" .) "visibleDevices" -}}
  {{- $env = append $env (dict "name" "NVIDIA_VISIBLE_DEVICES" "value" (include "weightd.text" .Values.gpu.visibleDevices.devices)) -}}
  {{- $env = append $env (dict "name" "NVIDIA_DRIVER_CAPABILITIES" "value" "compute,utility") -}}
{{- end -}}
{{- toYaml (concat $env .Values.extraEnv) -}}
{{- end -}}

{{/* Whether an engine of the Pod has the credentials as well; with an endpoint of weightd's own it asks nobody else. */}}
{{- define "weightd.engineHasCredentials" -}}
{{- if and .Values.engine.credentials (eq .Values.mode "sidecar") (not .Values.s3.enabled) }}yes{{ end -}}
{{- end -}}

{{/* Public: variables of an engine's container, a list. */}}
{{- define "weightd.engineEnv" -}}
{{- $weightd := get (default dict .Subcharts) "weightd" | default . -}}
{{- include "weightd.validate" $weightd -}}
{{- $values := $weightd.Values -}}
{{- $env := list (dict "name" "WEIGHTD_RUNTIME_DIR" "value" $values.runtimeDir) -}}
{{- $env = append $env (dict "name" "WEIGHTD_DAEMON_UID" "value" (include "weightd.daemonUid" $weightd)) -}}
{{- if $values.shim.enabled }}{{ $env = append $env (dict "name" "PYTHONPATH" "value" $values.shim.path) }}{{ end -}}
{{- if $values.s3.enabled -}}
  {{- range list "AWS_ENDPOINT_URL" "RUNAI_STREAMER_S3_ENDPOINT" -}}
    {{- $env = append $env (dict "name" . "value" (printf "http://127.0.0.1:%d" (int $values.ports.s3))) -}}
  {{- end -}}
{{- end -}}
{{- if and (eq (include "weightd.sharing" $weightd) "visibleDevices") (eq $values.mode "sidecar") (eq $values.gpu.visibleDevices.engine "same") -}}
  {{- $env = append $env (dict "name" "NVIDIA_VISIBLE_DEVICES" "value" (include "weightd.text" $values.gpu.visibleDevices.devices)) -}}
  {{- $env = append $env (dict "name" "NVIDIA_DRIVER_CAPABILITIES" "value" "compute,utility") -}}
{{- end -}}
{{- if include "weightd.engineHasCredentials" $weightd }}{{ $env = concat $env (include "weightd.credentialsEnv" $weightd | fromYamlArray) }}{{ end -}}
{{- toYaml $env -}}
{{- end -}}
