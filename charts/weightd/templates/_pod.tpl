{{/* What the Pods of both modes have in common. */}}
{{- define "weightd.podMetadata" -}}
{{- /* No versions: a Pod that is replaced for the sake of a label has lost its weights. */ -}}
{{- $own := merge (include "weightd.selectorLabels" . | fromYaml) (include "weightd.podLabels" . | fromYaml) -}}
{{- $labels := merge $own .Values.podLabels .Values.commonLabels -}}
labels:
  {{- toYaml $labels | nindent 2 }}
{{- with .Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "weightd.podCommon" -}}
serviceAccountName: {{ include "weightd.serviceAccountName" . }}
automountServiceAccountToken: {{ .Values.serviceAccount.automountToken }}
terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .Values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- $selector := dict "matchLabels" (include "weightd.selectorLabels" . | fromYaml) }}
  {{- range .Values.topologySpreadConstraints }}
  -
    {{- toYaml (hasKey . "labelSelector" | ternary . (set (deepCopy .) "labelSelector" $selector)) | nindent 4 }}
  {{- end }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with include "weightd.resourceClaims" . }}
resourceClaims:
  {{- . | nindent 2 }}
{{- end }}
{{- with .Values.podSpec }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end -}}
