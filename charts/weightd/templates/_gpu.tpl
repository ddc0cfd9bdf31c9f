{{/* How the GPU is shared, `auto` resolved. */}}
{{- define "weightd.sharing" -}}
{{- $sharing := .Values.gpu.sharing -}}
{{- if ne $sharing "auto" -}}
{{ $sharing }}
{{- else if eq .Values.image.variant "cpu" -}}
none
{{- else if eq .Values.mode "node" -}}
visibleDevices
{{- else if semverCompare ">=1.34-0" .Capabilities.KubeVersion.Version -}}
dra
{{- else -}}
visibleDevices
{{- end -}}
{{- end -}}

{{/* What weightd's container asks for: the values' resources, and its part of the GPU. */}}
{{- define "weightd.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- $limits := $resources.limits | default dict -}}
{{- $sharing := include "weightd.sharing" . -}}
{{- if eq $sharing "replicas" -}}
  {{- $_ := set $limits .Values.gpu.resourceName (.Values.gpu.count | int64) -}}
{{- end -}}
{{- if and .Values.rdma.enabled .Values.rdma.resourceName -}}
  {{- $_ := set $limits .Values.rdma.resourceName 1 -}}
{{- end -}}
{{- if $limits }}{{ $_ := set $resources "limits" $limits }}{{ end -}}
{{- if eq $sharing "dra" -}}
  {{- $_ := set $resources "claims" (list (dict "name" "weightd-gpu")) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Public: `resources` of an engine's container as far as they concern the GPU. */}}
{{- define "weightd.engineResources" -}}
{{- $weightd := get (default dict .Subcharts) "weightd" | default . -}}
{{- $gpu := $weightd.Values.gpu -}}
{{- $resources := dict -}}
{{- $sharing := include "weightd.sharing" $weightd -}}
{{- if eq $sharing "dra" -}}
  {{- $_ := set $resources "claims" (list (dict "name" "weightd-gpu")) -}}
{{- else if or (has $sharing (list "replicas" "singleContainer")) (and (eq $sharing "visibleDevices") (eq $gpu.visibleDevices.engine "request")) -}}
  {{- $_ := set $resources "limits" (dict $gpu.resourceName ($gpu.count | int64)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Public: `resourceClaims` of a Pod, empty where there are none. */}}
{{- define "weightd.resourceClaims" -}}
{{- $weightd := get (default dict .Subcharts) "weightd" | default . -}}
{{- $dra := $weightd.Values.gpu.dra -}}
{{- if eq (include "weightd.sharing" $weightd) "dra" -}}
- name: weightd-gpu
  {{- if $dra.claimName }}
  resourceClaimName: {{ $dra.claimName }}
  {{- else }}
  resourceClaimTemplateName: {{ $dra.claimTemplateName | default (printf "%s-gpu" (include "weightd.fullname" $weightd)) }}
  {{- end }}
{{- end -}}
{{- end -}}
