{{- define "weightd.ports" -}}
- {name: weightd-health, containerPort: {{ .Values.ports.health }}}
{{- if .Values.metrics.enabled }}
- {name: weightd-metrics, containerPort: {{ .Values.ports.metrics }}}
{{- end }}
{{- if .Values.peers.enabled }}
- {name: weightd-peers, containerPort: {{ .Values.ports.peers }}}
{{- end }}
{{- end -}}

{{/* The mounts that the variables of `credentials` name. */}}
{{- define "weightd.credentialsMounts" -}}
{{- if .Values.credentials.gcs.existingSecret }}
- {name: weightd-gcs, mountPath: /etc/weightd/gcs, readOnly: true}
{{- end }}
{{- if or .Values.credentials.caBundle.configMap .Values.credentials.caBundle.secret }}
{{- /* Over the image's own file: some libraries know no other place. */}}
- {name: weightd-ca, mountPath: /etc/ssl/certs/ca-certificates.crt, subPath: {{ .Values.credentials.caBundle.key }}, readOnly: true}
{{- end }}
{{- end -}}

{{/* The mounts of the daemon. */}}
{{- define "weightd.volumeMounts" -}}
- {name: weightd-run, mountPath: {{ .Values.runtimeDir }}}
- {name: weightd-cache, mountPath: {{ .Values.cache.path }}}
{{- if ne (include "weightd.sharing" .) "singleContainer" }}
- {name: weightd-tmp, mountPath: /tmp}
{{- end }}
{{- include "weightd.credentialsMounts" . }}
{{- if .Values.peers.enabled }}
{{- if eq .Values.peers.auth "tls" }}
- {name: weightd-peer-tls, mountPath: /etc/weightd/peer-tls, readOnly: true}
{{- end }}
{{- if and (eq .Values.peers.directory "etcd") .Values.peers.etcd.tlsSecret }}
- {name: weightd-etcd-tls, mountPath: /etc/weightd/etcd-tls, readOnly: true}
{{- end }}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The daemon's container; the caller adds what a sidecar has and a DaemonSet's container has not. */}}
{{- define "weightd.container" -}}
{{- $security := deepCopy .Values.securityContext -}}
{{- if .Values.rdma.enabled -}}
  {{- $capabilities := $security.capabilities | default dict -}}
  {{- $_ := set $capabilities "add" (append ($capabilities.add | default list) "IPC_LOCK" | uniq) -}}
  {{- $_ := set $security "capabilities" $capabilities -}}
{{- end -}}
name: weightd
image: {{ include "weightd.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
env:
  {{- include "weightd.env" . | nindent 2 }}
ports:
  {{- include "weightd.ports" . | nindent 2 }}
livenessProbe:
  httpGet: {path: /livez, port: weightd-health}
  {{- toYaml .Values.probes.liveness | nindent 2 }}
{{- with include "weightd.resources" . | fromYaml }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml $security | nindent 2 }}
volumeMounts:
  {{- include "weightd.volumeMounts" . | nindent 2 }}
{{- end -}}

{{/* The init container that copies weightd.ipc to where the engine imports it from. */}}
{{- define "weightd.shim" -}}
name: weightd-shim
image: {{ include "weightd.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command:
  - python3
  - -c
  - |
    import importlib.metadata, pathlib, shutil, weightd.ipc
    source, target = pathlib.Path(weightd.ipc.__file__).parent, pathlib.Path("{{ .Values.shim.path }}")
    shutil.copytree(source, target / "weightd/ipc", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    # By its entry points vLLM and SGLang find it.
    found = importlib.metadata.distribution("weightd")
    about = target / f"weightd-{found.version}.dist-info"
    about.mkdir(exist_ok=True)
    for name in ("METADATA", "entry_points.txt"):
        (about / name).write_text(found.read_text(name))
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  - {name: weightd-shim, mountPath: {{ .Values.shim.path }}}
{{- end -}}

{{/* Public: `initContainers` of a Pod that has weightd beside its engine; in mode `node` none but the shim. */}}
{{- define "weightd.sidecar" -}}
{{- $weightd := get (default dict .Subcharts) "weightd" | default . -}}
{{- include "weightd.validate" $weightd -}}
{{- with $weightd -}}
{{- $sidecar := and (eq .Values.mode "sidecar") (ne (include "weightd.sharing" .) "singleContainer") -}}
{{- if .Values.shim.enabled }}
-
  {{- include "weightd.shim" . | nindent 2 }}
{{- end }}
{{- if $sidecar }}
-
  {{- include "weightd.container" . | nindent 2 }}
  restartPolicy: Always
  {{- /* Until it succeeds, Kubernetes does not start the containers behind this one. */}}
  startupProbe:
    httpGet: {path: {{ ternary "/readyz" "/livez" .Values.startup.wait }}, port: weightd-health}
    periodSeconds: 1
    timeoutSeconds: 5
    failureThreshold: {{ .Values.startup.timeoutSeconds }}
{{- include "weightd.tracers" . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Public: mounts of an engine's container, a list. Read-only: connecting takes no more, and nobody replaces a socket. */}}
{{- define "weightd.engineVolumeMounts" -}}
{{- $weightd := get (default dict .Subcharts) "weightd" | default . -}}
{{- with $weightd -}}
- {name: weightd-run, mountPath: {{ .Values.runtimeDir }}, readOnly: true}
- {name: weightd-cache, mountPath: {{ .Values.cache.path }}, readOnly: true}
{{- if .Values.shim.enabled }}
- {name: weightd-shim, mountPath: {{ .Values.shim.path }}, readOnly: true}
{{- end }}
{{- if include "weightd.engineHasCredentials" . }}{{ include "weightd.credentialsMounts" . }}{{ end }}
{{- end }}
{{- end -}}

{{- define "weightd.hostPaths" -}}
run: {{ .Values.node.hostPath | default "/run/weightd" }}
cache: {{ .Values.node.cacheHostPath | default "/var/cache/weightd" }}
{{- end -}}

{{/* The volumes that weightd and its engines share. */}}
{{- define "weightd.sharedVolumes" -}}
{{- $paths := include "weightd.hostPaths" . | fromYaml -}}
{{- if eq .Values.mode "node" }}
- name: weightd-run
  hostPath: {path: {{ $paths.run }}, type: DirectoryOrCreate}
- name: weightd-cache
  hostPath: {path: {{ $paths.cache }}, type: DirectoryOrCreate}
{{- else }}
- name: weightd-run
  emptyDir: {}
- name: weightd-cache
  {{- if .Values.cache.existingClaim }}
  persistentVolumeClaim: {claimName: {{ .Values.cache.existingClaim }}}
  {{- else if .Values.cache.sizeLimit }}
  emptyDir: {sizeLimit: {{ .Values.cache.sizeLimit }}}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "weightd.credentialsVolumes" -}}
{{- with .Values.credentials.gcs.existingSecret }}
- name: weightd-gcs
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .Values.credentials.caBundle.configMap }}
- name: weightd-ca
  configMap: {name: {{ . }}}
{{- end }}
{{- with .Values.credentials.caBundle.secret }}
- name: weightd-ca
  secret: {secretName: {{ . }}}
{{- end }}
{{- end -}}

{{/* The volumes of the daemon, some of which an engine has as well. */}}
{{- define "weightd.ownVolumes" -}}
{{- if ne (include "weightd.sharing" .) "singleContainer" }}
- name: weightd-tmp
  emptyDir: {}
{{- end }}
{{- include "weightd.credentialsVolumes" . }}
{{- if .Values.peers.enabled }}
{{- if eq .Values.peers.auth "tls" }}
- name: weightd-peer-tls
  secret: {secretName: {{ .Values.peers.tls.existingSecret }}, defaultMode: 0440}
{{- end }}
{{- if and (eq .Values.peers.directory "etcd") .Values.peers.etcd.tlsSecret }}
- name: weightd-etcd-tls
  secret: {secretName: {{ .Values.peers.etcd.tlsSecret }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Public: volumes of a Pod with weightd in it; in mode `node`, of a Pod whose engines attach to the node's weightd. */}}
{{- define "weightd.volumes" -}}
{{- $weightd := get (default dict .Subcharts) "weightd" | default . -}}
{{- with $weightd -}}
{{- include "weightd.sharedVolumes" . }}
{{- if .Values.shim.enabled }}
- name: weightd-shim
  emptyDir: {}
{{- end }}
{{- if eq .Values.mode "sidecar" }}
{{- include "weightd.ownVolumes" . }}
{{- end }}
{{- end }}
{{- end -}}
