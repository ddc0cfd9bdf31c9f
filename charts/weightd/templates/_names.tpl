{{/*
Every public template (see README.md) takes the context of this chart, or that of a chart that depends on it.
*/}}

{{/* The release's name for what is rendered: at most 52 characters, so that what is added to it fits in 63. */}}
{{- define "weightd.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
  {{- $chart := default .Chart.Name .Values.nameOverride -}}
  {{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name $chart) (contains $chart .Release.Name) -}}
{{- end -}}
{{- if gt (len $name) 52 -}}
  {{- /* Cut names could be equal: the hash of the whole keeps releases apart. */ -}}
  {{- $name = printf "%s-%s" (trunc 43 $name | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "weightd.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What all Pods with a weightd of this release have, those of other charts included: peers, policies and monitors go by it. */}}
{{- define "weightd.fleetLabels" -}}
weightd/fleet: {{ include "weightd.fullname" . }}
{{- end -}}

{{- define "weightd.labels" -}}
{{- $own := include "weightd.selectorLabels" . | fromYaml -}}
{{- $_ := set $own "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-") -}}
{{- $_ := set $own "app.kubernetes.io/version" .Chart.AppVersion -}}
{{- $_ := set $own "app.kubernetes.io/managed-by" .Release.Service -}}
{{- toYaml (merge $own .Values.commonLabels) -}}
{{- end -}}

{{/* Public: labels for Pods with weightd in them. */}}
{{- define "weightd.podLabels" -}}
{{- $weightd := get (default dict .Subcharts) "weightd" | default . -}}
{{ include "weightd.fleetLabels" $weightd }}
{{- if $weightd.Values.credentials.azure.clientId }}
azure.workload.identity/use: "true"
{{- end }}
{{- end -}}

{{/* Public: the service account that has the credentials. */}}
{{- define "weightd.serviceAccountName" -}}
{{- $weightd := get (default dict .Subcharts) "weightd" | default . -}}
{{- $account := $weightd.Values.serviceAccount -}}
{{- $account.name | default (ternary (include "weightd.fullname" $weightd) "default" $account.create) -}}
{{- end -}}

{{- define "weightd.image" -}}
{{- $image := .Values.image -}}
{{- $tag := $image.tag | default (printf "%s-%s" .Chart.AppVersion $image.variant) -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $tag }}
{{- end -}}
{{- end -}}

{{- define "weightd.engineImage" -}}
{{- $image := .Values.engine.image -}}
{{ $image.repository }}{{ ternary (print ":" $image.tag) (print "@" $image.digest) (empty $image.digest) }}
{{- end -}}

{{/* The port of the API on loopback; empty where there is none. */}}
{{- define "weightd.apiPort" -}}
{{- get .Values.settings "listen" | default (ternary "" "127.0.0.1:7400" (hasKey .Values.settings "listen")) | regexFind "[0-9]+$" -}}
{{- end -}}
