{{/* What the schema cannot say: values that contradict each other. Fails naming both, and what to do. */}}
{{- define "weightd.validate" -}}
{{- if not (hasKey .Values "preload") -}}
  {{- fail "weightd: this is not the context of the chart weightd: pass .Subcharts.NAME, by the name or alias of the dependency, and include nothing where it is switched off" -}}
{{- end -}}
{{- include "weightd.validateMode" . -}}
{{- include "weightd.validateGpu" . -}}
{{- include "weightd.validatePreload" . -}}
{{- include "weightd.validateMemory" . -}}
{{- include "weightd.validateCredentials" . -}}
{{- include "weightd.validatePeers" . -}}
{{- include "weightd.validateMounts" . -}}
{{- include "weightd.validateTrace" . -}}
{{- include "weightd.validateEnv" . -}}
{{- if and .Values.metrics.podMonitor.enabled .Values.metrics.serviceMonitor.enabled -}}
  {{- fail "metrics.podMonitor and metrics.serviceMonitor are both enabled: everything would be counted twice" -}}
{{- end -}}
{{- if and (or .Values.metrics.podMonitor.enabled .Values.metrics.serviceMonitor.enabled) (not .Values.metrics.enabled) -}}
  {{- fail "metrics.enabled is false: there is nothing for a PodMonitor or ServiceMonitor to scrape" -}}
{{- end -}}
{{- end -}}

{{- define "weightd.validateMode" -}}
{{- if eq .Values.mode "sidecar" -}}
  {{- if or .Values.node.hostPath .Values.node.cacheHostPath -}}
    {{- fail "node.hostPath and node.cacheHostPath are for mode: node; in mode: sidecar the folders are the Pod's own" -}}
  {{- end -}}
{{- else -}}
  {{- if or .Values.cache.existingClaim .Values.cache.sizeLimit -}}
    {{- fail "cache.existingClaim and cache.sizeLimit are for mode: sidecar; in mode: node the cache is node.cacheHostPath" -}}
  {{- end -}}
  {{- $paths := include "weightd.hostPaths" . | fromYaml -}}
  {{- if eq (clean $paths.run) (clean $paths.cache) -}}
    {{- fail "node.hostPath and node.cacheHostPath are the same folder: engines may enter the one and not the other" -}}
  {{- end -}}
{{- end -}}
{{- if and .Values.cache.existingClaim .Values.cache.sizeLimit -}}
  {{- fail "cache.existingClaim and cache.sizeLimit: a claim has its own size" -}}
{{- end -}}
{{- if .Values.s3.enabled -}}
  {{- if ne .Values.mode "sidecar" -}}
    {{- fail "s3.enabled is for mode: sidecar: the S3 endpoint is on loopback, which Pods do not share" -}}
  {{- end -}}
  {{- if eq (include "weightd.sharing" .) "singleContainer" -}}
    {{- fail "s3.enabled and gpu.sharing: singleContainer: both processes would have one endpoint, and weightd would ask itself" -}}
  {{- end -}}
{{- end -}}
{{- $paths := list (clean .Values.runtimeDir) (clean .Values.cache.path) "/tmp" -}}
{{- if .Values.shim.enabled }}{{ $paths = append $paths (clean .Values.shim.path) }}{{ end -}}
{{- if lt (len (uniq $paths)) (len $paths) -}}
  {{- fail (printf "runtimeDir, cache.path, shim.path and /tmp must differ, found %s" (join ", " $paths)) -}}
{{- end -}}
{{- $ports := dict "ports.health" .Values.ports.health "ports.metrics" .Values.ports.metrics "ports.peers" .Values.ports.peers "ports.s3" .Values.ports.s3 -}}
{{- with include "weightd.apiPort" . }}{{ $_ := set $ports "settings.listen" (int .) }}{{ end -}}
{{- with get .Values.settings "listen" -}}
  {{- if not (or $.Values.apiToken.existingSecret (regexMatch "^(localhost|127[.][0-9.]+|\\[::1\\]):" .)) -}}
    {{- fail (printf "settings.listen: %s is open to the network: name the Secret of its token, apiToken.existingSecret, or listen on 127.0.0.1" .) -}}
  {{- end -}}
{{- end -}}
{{- if and (eq .Values.mode "sidecar") .Values.engine.enabled }}{{ $_ := set $ports "engine.port" .Values.engine.port }}{{ end -}}
{{- $seen := dict -}}
{{- range $name, $port := $ports -}}
  {{- $number := toString (int $port) -}}
  {{- if hasKey $seen $number }}{{ fail (printf "%s and %s are both %s: they share one network namespace" (get $seen $number) $name $number) }}{{ end -}}
  {{- $_ := set $seen $number $name -}}
{{- end -}}
{{- end -}}

{{- define "weightd.validateGpu" -}}
{{- $gpu := .Values.gpu -}}
{{- $sharing := include "weightd.sharing" . -}}
{{- $node := eq .Values.mode "node" -}}
{{- if and (eq .Values.image.variant "cpu") (has $sharing (list "dra" "visibleDevices" "replicas")) -}}
  {{- fail (printf "image.variant: cpu has no CUDA, and gpu.sharing: %s would give it a GPU" $sharing) -}}
{{- end -}}
{{- if eq $sharing "dra" -}}
  {{- if semverCompare "<1.34-0" .Capabilities.KubeVersion.Version -}}
    {{- fail (printf "gpu.sharing: dra needs Kubernetes 1.34 (resource.k8s.io/v1), this is %s: choose another way" .Capabilities.KubeVersion.Version) -}}
  {{- end -}}
  {{- if and $gpu.dra.claimName $gpu.dra.claimTemplateName -}}
    {{- fail "gpu.dra.claimName and gpu.dra.claimTemplateName: name one of them" -}}
  {{- end -}}
  {{- if and $node (not $gpu.dra.adminAccess) (not $gpu.dra.claimTemplateName) -}}
    {{- fail "mode: node with gpu.sharing: dra would take GPUs away from the engines: set gpu.dra.adminAccess, or gpu.sharing: visibleDevices" -}}
  {{- end -}}
  {{- if and $node $gpu.dra.claimName -}}
    {{- fail "gpu.dra.claimName is one node's: mode: node has a Pod on each" -}}
  {{- end -}}
  {{- if and $gpu.dra.adminAccess (not $node) -}}
    {{- fail "gpu.dra.adminAccess is for mode: node: an engine is to have GPUs of its own" -}}
  {{- end -}}
  {{- if or (dig "limits" $gpu.resourceName "" .Values.engine.resources) (dig "limits" $gpu.resourceName "" .Values.resources) -}}
    {{- fail (printf "resources ask for %s and gpu.sharing: dra for a claim: the container would have two different GPUs" $gpu.resourceName) -}}
  {{- end -}}
{{- end -}}
{{- if and (eq $sharing "visibleDevices") (dig "limits" $gpu.resourceName "" .Values.resources) -}}
  {{- fail (printf "resources asks for %s: gpu.sharing: visibleDevices is for a weightd that asks for none" $gpu.resourceName) -}}
{{- end -}}
{{- if and (eq $sharing "none") (or (dig "limits" $gpu.resourceName "" .Values.engine.resources) (dig "limits" $gpu.resourceName "" .Values.resources)) -}}
  {{- fail (printf "resources ask for %s, and gpu.sharing is none" $gpu.resourceName) -}}
{{- end -}}
{{- range $device, $_ := .Values.settings.capacity -}}
  {{- if and (eq $sharing "none") (hasPrefix "cuda:" $device) -}}
    {{- fail (printf "settings.capacity names %s, and gpu.sharing: none gives weightd no GPU" $device) -}}
  {{- end -}}
{{- end -}}
{{- if eq $sharing "singleContainer" -}}
  {{- if $node }}{{ fail "gpu.sharing: singleContainer is for mode: sidecar: in mode: node the engines have Pods of their own" }}{{ end -}}
  {{- if not .Values.engine.enabled }}{{ fail "gpu.sharing: singleContainer renders the engine's container: it needs engine.enabled" }}{{ end -}}
  {{- if not .Values.engine.command }}{{ fail "gpu.sharing: singleContainer replaces the image's entrypoint: engine.command has to say what to run" }}{{ end -}}
{{- end -}}
{{- end -}}

{{- define "weightd.validatePreload" -}}
{{- $values := .Values -}}
{{- $sharing := include "weightd.sharing" . -}}
{{- $owned := and (eq $values.mode "sidecar") (or (eq $sharing "singleContainer") (and (eq $sharing "dra") (not $values.gpu.dra.claimName) (not $values.gpu.dra.claimTemplateName))) -}}
{{- range $i, $request := $values.preload -}}
  {{- $where := printf "preload[%d]" $i -}}
  {{- range (kindIs "slice" $request.device | ternary $request.device (list $request.device)) -}}
    {{- $device := . | default "" -}}
    {{- if and (eq $sharing "none") $device (not (hasPrefix "cpu" $device)) -}}
      {{- fail (printf "%s: device %s, and gpu.sharing: none gives weightd no GPU" $where $device) -}}
    {{- end -}}
    {{- if and (hasPrefix "cpu:" $device) (not (hasKey ($values.settings.capacity | default dict) $device)) -}}
      {{- fail (printf "%s: device %s is not in settings.capacity, which makes it" $where $device) -}}
    {{- end -}}
    {{- if and $owned (hasPrefix "cuda:" $device) (ge (trimPrefix "cuda:" $device | int) (int $values.gpu.count)) -}}
      {{- fail (printf "%s: device %s, and weightd sees %d GPUs (gpu.count), from cuda:0 on" $where $device (int $values.gpu.count)) -}}
    {{- end -}}
  {{- end -}}
  {{- with $request.parallel -}}
    {{- $size := .tp_size | default 1 | int -}}
    {{- $ranks := kindIs "slice" .tp_rank | ternary .tp_rank (list .tp_rank) -}}
    {{- range $ranks -}}
      {{- if and (not (kindIs "string" .)) (ge (int .) $size) -}}
        {{- fail (printf "%s: parallel.tp_rank %d is not below tp_size %d" $where (int .) $size) -}}
      {{- end -}}
    {{- end -}}
    {{- if kindIs "slice" $request.device -}}
      {{- $count := eq (toString .tp_rank) "all" | ternary $size (len (uniq $ranks)) -}}
      {{- if ne (len $request.device) $count }}{{ fail (printf "%s: device lists %d devices for %d ranks: one for each" $where (len $request.device) $count) }}{{ end -}}
    {{- end -}}
  {{- else -}}
    {{- if and (kindIs "slice" $request.device) (ne (len $request.device) 1) -}}
      {{- fail (printf "%s: device lists %d devices for one segment: parallel says how to cut" $where (len $request.device)) -}}
    {{- end -}}
  {{- end -}}
  {{- if and (eq (join "," $request.sources) "peer") (not $values.peers.enabled) -}}
    {{- fail (printf "%s: sources: [peer], and peers.enabled is false" $where) -}}
  {{- end -}}
{{- end -}}
{{- if gt (len (include "weightd.preload" .)) 100000 -}}
  {{- fail "preload is longer than 100,000 characters, more than fits in a variable: mount a file by extraVolumes and name it by WEIGHTD_PRELOAD in extraEnv" -}}
{{- end -}}
{{- end -}}

{{/* A size of Kubernetes (64Gi) or of the daemon (64GiB, 64 GB) in bytes. */}}
{{- define "weightd.bytes" -}}
{{- $text := kindIs "string" . | ternary . (toJson .) | lower | replace " " "" | trimSuffix "b" -}}
{{- $unit := regexFind "[a-z]*$" $text -}}
{{- $factors := dict "k" 1e3 "m" 1e6 "g" 1e9 "t" 1e12 "p" 1e15 "e" 1e18 "ki" 1024.0 "mi" 1048576.0 "gi" 1073741824.0 "ti" 1099511627776.0 "pi" 1125899906842624.0 "ei" 1152921504606846976.0 -}}
{{- mulf (float64 (trimSuffix $unit $text)) (get $factors $unit | default 1.0) | printf "%.0f" -}}
{{- end -}}

{{- define "weightd.validateMemory" -}}
{{- $single := eq (include "weightd.sharing" .) "singleContainer" -}}
{{- $limit := dig "limits" "memory" "" (ternary .Values.engine.resources .Values.resources $single) -}}
{{- if $limit -}}
  {{- $capacity := 0.0 -}}
  {{- range $device, $size := .Values.settings.capacity -}}
    {{- if hasPrefix "cpu" $device }}{{ $capacity = addf $capacity (include "weightd.bytes" $size | float64) }}{{ end -}}
  {{- end -}}
  {{- if gt $capacity (include "weightd.bytes" $limit | float64) -}}
    {{- fail (printf "settings.capacity gives segments %.0f bytes of host memory, which count as the container's, whose limit is %s: it would be killed" $capacity (toString $limit)) -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{- define "weightd.validateCredentials" -}}
{{- $credentials := .Values.credentials -}}
{{- $identities := list -}}
{{- range $names := list (list "s3" "roleArn") (list "gcs" "serviceAccount") (list "azure" "clientId") -}}
  {{- $cloud := get $credentials (first $names) -}}
  {{- if get $cloud (last $names) -}}
    {{- $identities = append $identities (printf "credentials.%s.%s" (first $names) (last $names)) -}}
    {{- if $cloud.existingSecret -}}
      {{- fail (printf "credentials.%s.existingSecret and credentials.%s.%s: name one of them" (first $names) (first $names) (last $names)) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if and $identities (not .Values.serviceAccount.create) -}}
  {{- fail (printf "%s is an annotation of the service account, which serviceAccount.create: false leaves to you: annotate it yourself, and label Pods by podLabels where that is needed" (first $identities)) -}}
{{- end -}}
{{- if and $credentials.gcs.existingSecret $credentials.gcs.emulator -}}
  {{- fail "credentials.gcs.emulator is asked without credentials: leave credentials.gcs.existingSecret empty" -}}
{{- end -}}
{{- if and $credentials.caBundle.configMap $credentials.caBundle.secret -}}
  {{- fail "credentials.caBundle.configMap and credentials.caBundle.secret: name one of them" -}}
{{- end -}}
{{- end -}}

{{- define "weightd.validatePeers" -}}
{{- $peers := .Values.peers -}}
{{- if $peers.enabled -}}
  {{- if and (eq $peers.auth "tls") (not $peers.tls.existingSecret) -}}
    {{- fail "peers.auth: tls needs peers.tls.existingSecret, with tls.crt, tls.key and ca.crt" -}}
  {{- end -}}
  {{- if and (eq $peers.directory "etcd") (not $peers.etcd.endpoints) -}}
    {{- fail "peers.directory: etcd needs peers.etcd.endpoints, as in [http://etcd:2379]" -}}
  {{- end -}}
  {{- if and (eq $peers.directory "dns") $peers.etcd.endpoints -}}
    {{- fail "peers.etcd.endpoints is set, and peers.directory is dns: one of them is a mistake" -}}
  {{- end -}}
  {{- if and $peers.etcd.clientCertificate (not $peers.etcd.tlsSecret) -}}
    {{- fail "peers.etcd.clientCertificate needs peers.etcd.tlsSecret, which has it" -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{- define "weightd.validateMounts" -}}
{{- $reserved := dict "weightd-run" true "weightd-cache" true "weightd-tmp" true "weightd-gcs" true "weightd-ca" true "weightd-peer-tls" true "weightd-etcd-tls" true "weightd-shim" true "engine-shm" true -}}
{{- $volumes := dict -}}
{{- range .Values.extraVolumes -}}
  {{- if hasKey $reserved .name }}{{ fail (printf "extraVolumes: %s is a name of the chart's own volumes" .name) }}{{ end -}}
  {{- if hasKey $volumes .name }}{{ fail (printf "extraVolumes: %s is there twice" .name) }}{{ end -}}
  {{- $_ := set $volumes .name true -}}
{{- end -}}
{{- range $list, $mounts := dict "extraVolumeMounts" .Values.extraVolumeMounts "engine.volumeMounts" .Values.engine.volumeMounts -}}
  {{- range $mounts -}}
    {{- if not (hasKey $volumes .name) }}{{ fail (printf "%s: no volume %s is in extraVolumes" $list .name) }}{{ end -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{- define "weightd.validateTrace" -}}
{{- $trace := .Values.trace -}}
{{- $sharing := include "weightd.sharing" . -}}
{{- if $trace.enabled -}}
  {{- if eq $sharing "singleContainer" -}}
    {{- fail "trace.enabled and gpu.sharing: singleContainer: weightd starts with the engine, and no init container can ask it" -}}
  {{- end -}}
  {{- if not (include "weightd.traced" . | fromYamlArray) -}}
    {{- fail (printf "trace.enabled, and nothing to trace: say %s" (ternary "trace.models" "engine.model" (eq .Values.mode "node"))) -}}
  {{- end -}}
  {{- range $i, $model := include "weightd.traced" . | fromYamlArray -}}
    {{- if not $model.processor -}}
      {{- fail "trace.processor: say what the engine will run on, by the compute capability of the GPUs, as in 'cuda 9.0'" -}}
    {{- end -}}
    {{- if and (eq $sharing "none") (ne $model.processor "cpu") -}}
      {{- fail (printf "trace: %s is for processor %s, and gpu.sharing: none gives weightd no GPU" $model.model $model.processor) -}}
    {{- end -}}
  {{- end -}}
{{- else if $trace.models -}}
  {{- fail "trace.models is set, and trace.enabled is false: one of them is a mistake" -}}
{{- end -}}
{{- end -}}

{{- define "weightd.validateEnv" -}}
{{- $daemon := include "weightd.env" . | fromYamlArray -}}
{{- $lists := dict "extraEnv" $daemon -}}
{{- if or (and (eq .Values.mode "sidecar") .Values.engine.enabled) .Values.trace.enabled -}}
  {{- if eq (include "weightd.sharing" .) "singleContainer" -}}
    {{- $_ := set $lists "engine.env" (concat $daemon .Values.engine.env) -}}
  {{- else -}}
    {{- $own := list (dict "name" "WEIGHTD_RUNTIME_DIR") (dict "name" "WEIGHTD_DAEMON_UID") -}}
    {{- if .Values.shim.enabled }}{{ $own = append $own (dict "name" "PYTHONPATH") }}{{ end -}}
    {{- if .Values.s3.enabled }}{{ $own = concat $own (list (dict "name" "AWS_ENDPOINT_URL") (dict "name" "RUNAI_STREAMER_S3_ENDPOINT")) }}{{ end -}}
    {{- if and (eq (include "weightd.sharing" .) "visibleDevices") (eq .Values.gpu.visibleDevices.engine "same") -}}
      {{- $own = concat $own (list (dict "name" "NVIDIA_VISIBLE_DEVICES") (dict "name" "NVIDIA_DRIVER_CAPABILITIES")) -}}
    {{- end -}}
    {{- if or (include "weightd.engineHasCredentials" .) (and .Values.engine.credentials (eq .Values.mode "node")) }}{{ $own = concat $own (include "weightd.credentialsEnv" . | fromYamlArray) }}{{ end -}}
    {{- $_ := set $lists "engine.env" (concat $own .Values.engine.env) -}}
  {{- end -}}
{{- end -}}
{{- range $list, $env := $lists -}}
  {{- $seen := dict -}}
  {{- range $env -}}
    {{- if hasKey $seen .name }}{{ fail (printf "%s: %s is there already: another value of the chart sets it, or it is listed twice" $list .name) }}{{ end -}}
    {{- $_ := set $seen .name true -}}
  {{- end -}}
{{- end -}}
{{- end -}}
