{{- define "sdxs.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "sdxs.labels" -}}
app.kubernetes.io/name: sdxs
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- /* What selects the pods of one component, and nothing that changes between releases. */ -}}
{{- define "sdxs.selector" -}}
app.kubernetes.io/name: sdxs
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- /* What replicas need of their process, whatever the settings: services/fabric/environment.py and services/cluster.py say why. */ -}}
{{- define "sdxs.environment" -}}
- { name: SDXS_GATEWAY_ADDRESS, value: "0.0.0.0:8500" }
- { name: MALLOC_ARENA_MAX, value: "1" }
- { name: MALLOC_MMAP_THRESHOLD_, value: "1073741824" }
- { name: MALLOC_TRIM_THRESHOLD_, value: "1073741824" }
- { name: MALLOC_TOP_PAD_, value: "67108864" }
- { name: OMP_NUM_THREADS, value: "1" }
- { name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0" }
- { name: RAY_worker_niceness, value: "0" }
- { name: RAY_USAGE_STATS_ENABLED, value: "0" }
{{- end -}}

{{- /* A pod of the Ray cluster: (dict "root" $ "component" "gateway" "node" .Values.gateway "ports" (list ...) "readiness" (dict ...)) */ -}}
{{- define "sdxs.pod" -}}
metadata:
  labels: {{- include "sdxs.selector" . | nindent 4 }}
spec:
  {{- with .root.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if ne .component "head" }}{{/* the autoscaler in the head pod talks to Kubernetes */}}
  automountServiceAccountToken: false
  {{- end }}
  securityContext: { runAsNonRoot: true, runAsUser: 1000, fsGroup: 1000, seccompProfile: { type: RuntimeDefault } }
  {{- with .node.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .node.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray
      image: {{ printf "%s:%s" .root.Values.image.repository (.root.Values.image.tag | default .root.Chart.AppVersion) | quote }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      securityContext: { allowPrivilegeEscalation: false, capabilities: { drop: [ALL] } }
      env:
        {{- include "sdxs.environment" . | nindent 8 }}
        {{- if and (eq .component "gateway") .root.Values.service.webPort }}
        - { name: SDXS_GATEWAY_HTTP_ADDRESS, value: "0.0.0.0:8501" }
        {{- end }}
        {{- range $name, $value := .root.Values.settings }}
        {{- if ne (toString $value) "" }}
        - { name: {{ printf "SDXS_%s" (upper $name) }}, value: {{ $value | quote }} }
        {{- end }}
        {{- end }}
      envFrom:
        - secretRef: { name: {{ .root.Values.existingSecret }} }
      {{- with .ports }}
      ports: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .readiness }}
      readinessProbe: {{- toYaml . | nindent 8 }}
      {{- end }}
      resources: {{- toYaml .node.resources | nindent 8 }}
{{- end -}}
