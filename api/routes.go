package api

import "net/http"

const (
	get       = http.MethodGet
	put       = http.MethodPut
	del       = http.MethodDelete
	anyMethod = ""
)

// Capabilities that routes ask for: Nomad's
// (https://developer.hashicorp.com/nomad/docs/secure/acl/policies/capabilities), those
// of nodes, operators and agents as kind:access, and our own for models.
const (
	open            = "" // no capability needed
	management      = "management"
	listJobs        = "list-jobs"
	readJob         = "read-job"
	submitJob       = "submit-job"
	dispatchJob     = "dispatch-job"
	scaleJob        = "scale-job"
	parseJob        = "parse-job"
	readLogs        = "read-logs"
	readFS          = "read-fs"
	allocExec       = "alloc-exec"
	allocLifecycle  = "alloc-lifecycle"
	readScaling     = "read-scaling-policy"
	listScaling     = "list-scaling-policies"
	readJobScaling  = "read-job-scaling"
	variablesRead   = "variables:read"
	variablesWrite  = "variables:write"
	nodeRead        = "node:read"
	nodeWrite       = "node:write"
	nodePoolRead    = "node_pool:read"
	nodePoolWrite   = "node_pool:write"
	operatorRead    = "operator:read"
	operatorWrite   = "operator:write"
	agentRead       = "agent:read"
	agentWrite      = "agent:write"
	quotaRead       = "quota:read"
	quotaWrite      = "quota:write"
	csiListVolume   = "csi-list-volume"
	csiWriteVolume  = "csi-write-volume"
	pluginList      = "plugin:list"
	modelRead       = "model:read"
	modelWrite      = "model:write"
	recommendations = "submit-recommendation"
)

// routes is every route of the server.
var routes = []route{
	{method: get, pattern: "/", capability: open, handle: (*Server).frontPage},
	{method: get, pattern: "/.well-known/jwks.json", capability: open, handle: later("workload identities and their keys")},

	// Jobs.
	{method: get, pattern: "/v1/jobs", capability: listJobs, handle: (*Server).listJobs},
	{method: put, pattern: "/v1/jobs", capability: submitJob, handle: (*Server).registerJob},
	{method: put, pattern: "/v1/jobs/parse", capability: parseJob, handle: (*Server).parseJob},
	{method: anyMethod, pattern: "/v1/jobs/statuses", capability: listJobs, handle: later("the job list of Nomad's console")},
	{method: put, pattern: "/v1/validate/job", capability: readJob, handle: (*Server).validateJob},
	{method: put, pattern: "/v1/job/*job/plan", capability: submitJob, handle: (*Server).planJob},
	{method: put, pattern: "/v1/job/*job/evaluate", capability: submitJob, handle: (*Server).evaluateJob},
	{method: put, pattern: "/v1/job/*job/revert", capability: submitJob, handle: (*Server).revertJob},
	{method: put, pattern: "/v1/job/*job/stable", capability: submitJob, handle: (*Server).setStable},
	{method: put, pattern: "/v1/job/*job/scale", capability: scaleJob, handle: (*Server).scaleJob},
	{method: get, pattern: "/v1/job/*job/scale", capability: readJobScaling, handle: (*Server).scaleStatus},
	{method: put, pattern: "/v1/job/*job/dispatch", capability: dispatchJob, handle: later("parameterized jobs")},
	{method: put, pattern: "/v1/job/*job/periodic/force", capability: submitJob, handle: later("periodic jobs")},
	{method: anyMethod, pattern: "/v1/job/*job/versions/:tag/tag", capability: submitJob, handle: later("tags of job versions")},
	{method: get, pattern: "/v1/job/*job/action", capability: allocExec, handle: later("job actions")},
	{method: get, pattern: "/v1/job/*job/allocations", capability: readJob, handle: (*Server).jobAllocs},
	{method: get, pattern: "/v1/job/*job/evaluations", capability: readJob, handle: (*Server).jobEvals},
	{method: get, pattern: "/v1/job/*job/deployments", capability: readJob, handle: (*Server).jobDeployments},
	{method: get, pattern: "/v1/job/*job/deployment", capability: readJob, handle: (*Server).jobDeployment},
	{method: get, pattern: "/v1/job/*job/summary", capability: readJob, handle: (*Server).jobSummary},
	{method: get, pattern: "/v1/job/*job/versions", capability: readJob, handle: (*Server).jobVersions},
	{method: get, pattern: "/v1/job/*job/submission", capability: readJob, handle: (*Server).jobSubmission},
	{method: get, pattern: "/v1/job/*job/services", capability: readJob, handle: none},
	{method: get, pattern: "/v1/job/*job", capability: readJob, handle: (*Server).readJob},
	{method: put, pattern: "/v1/job/*job", capability: submitJob, handle: (*Server).registerJob},
	{method: del, pattern: "/v1/job/*job", capability: submitJob, handle: (*Server).deregisterJob},

	// Evaluations and deployments.
	{method: get, pattern: "/v1/evaluations", capability: readJob, handle: (*Server).listEvals},
	{method: del, pattern: "/v1/evaluations", capability: management, handle: later("deleting evaluations; old ones are collected by the servers")},
	{method: get, pattern: "/v1/evaluations/count", capability: readJob, handle: (*Server).countEvals},
	{method: get, pattern: "/v1/evaluation/:id", capability: readJob, handle: (*Server).readEval},
	{method: get, pattern: "/v1/evaluation/:id/allocations", capability: readJob, handle: (*Server).evalAllocs},
	{method: get, pattern: "/v1/deployments", capability: readJob, handle: (*Server).listDeployments},
	{method: get, pattern: "/v1/deployment/:id", capability: readJob, handle: (*Server).readDeployment},
	{method: get, pattern: "/v1/deployment/allocations/:id", capability: readJob, handle: (*Server).deploymentAllocs},
	{method: put, pattern: "/v1/deployment/fail/:id", capability: submitJob, handle: (*Server).failDeployment},
	{method: put, pattern: "/v1/deployment/pause/:id", capability: submitJob, handle: (*Server).pauseDeployment},
	{method: put, pattern: "/v1/deployment/promote/:id", capability: submitJob, handle: (*Server).promoteDeployment},
	{method: put, pattern: "/v1/deployment/unblock/:id", capability: submitJob, handle: (*Server).unblockDeployment},
	{method: put, pattern: "/v1/deployment/allocation-health/:id", capability: submitJob, handle: later("setting the health of allocations by hand")},

	// Allocations.
	{method: get, pattern: "/v1/allocations", capability: readJob, handle: (*Server).listAllocs},
	{method: get, pattern: "/v1/allocation/:id", capability: readJob, handle: (*Server).readAlloc},
	{method: put, pattern: "/v1/allocation/:id/stop", capability: allocLifecycle, handle: (*Server).stopAlloc},
	{method: get, pattern: "/v1/allocation/:id/services", capability: readJob, handle: none},

	// Through the servers to nodes.
	{method: get, pattern: "/v1/client/fs/logs/:id", capability: readLogs, handle: (*Server).logs},
	{method: get, pattern: "/v1/client/fs/stat/:id", capability: readFS, handle: (*Server).statFile},
	{method: get, pattern: "/v1/client/fs/ls/:id", capability: readFS, handle: (*Server).listFiles},
	{method: get, pattern: "/v1/client/fs/cat/:id", capability: readFS, handle: (*Server).catFile},
	{method: get, pattern: "/v1/client/fs/readat/:id", capability: readFS, handle: (*Server).readFileAt},
	{method: get, pattern: "/v1/client/fs/stream/:id", capability: readFS, handle: (*Server).streamFile},
	{method: get, pattern: "/v1/client/allocation/:id/stats", capability: readJob, handle: (*Server).allocStats},
	{method: get, pattern: "/v1/client/allocation/:id/checks", capability: readJob, handle: (*Server).allocChecks},
	{method: put, pattern: "/v1/client/allocation/:id/restart", capability: allocLifecycle, handle: (*Server).restartAlloc},
	{method: put, pattern: "/v1/client/allocation/:id/signal", capability: allocLifecycle, handle: (*Server).signalAlloc},
	{method: get, pattern: "/v1/client/allocation/:id/exec", capability: allocExec, handle: later("exec into an allocation")},
	{method: anyMethod, pattern: "/v1/client/allocation/:id/pause", capability: allocLifecycle, handle: enterprise},
	{method: anyMethod, pattern: "/v1/client/allocation/:id/gc", capability: nodeWrite, handle: later("collecting one allocation; nodes collect by themselves")},
	{method: anyMethod, pattern: "/v1/client/gc", capability: nodeWrite, handle: later("collecting on demand; nodes collect by themselves")},
	{method: get, pattern: "/v1/client/stats", capability: nodeRead, handle: (*Server).nodeStats},
	{method: anyMethod, pattern: "/v1/client/metadata", capability: nodeWrite, handle: later("dynamic node metadata")},

	// Nodes.
	{method: get, pattern: "/v1/nodes", capability: nodeRead, handle: (*Server).listNodes},
	{method: get, pattern: "/v1/node/pools", capability: nodePoolRead, handle: (*Server).listPools},
	{method: put, pattern: "/v1/node/pools", capability: nodePoolWrite, handle: later("node pools of your own")},
	{method: get, pattern: "/v1/node/pool/:pool", capability: nodePoolRead, handle: (*Server).readPool},
	{method: put, pattern: "/v1/node/pool/:pool", capability: nodePoolWrite, handle: later("node pools of your own")},
	{method: del, pattern: "/v1/node/pool/:pool", capability: nodePoolWrite, handle: later("node pools of your own")},
	{method: get, pattern: "/v1/node/pool/:pool/nodes", capability: nodePoolRead, handle: (*Server).poolNodes},
	{method: get, pattern: "/v1/node/pool/:pool/jobs", capability: nodePoolRead, handle: (*Server).poolJobs},
	{method: get, pattern: "/v1/node/:id", capability: nodeRead, handle: (*Server).readNode},
	{method: get, pattern: "/v1/node/:id/allocations", capability: nodeRead, handle: (*Server).nodeAllocs},
	{method: put, pattern: "/v1/node/:id/eligibility", capability: nodeWrite, handle: (*Server).setEligibility},
	{method: put, pattern: "/v1/node/:id/drain", capability: nodeWrite, handle: (*Server).drainNode},
	{method: put, pattern: "/v1/node/:id/evaluate", capability: nodeWrite, handle: (*Server).evaluateNode},
	{method: put, pattern: "/v1/node/:id/purge", capability: nodeWrite, handle: (*Server).purgeNode},

	// Cluster and operator.
	{method: get, pattern: "/v1/status/leader", capability: open, handle: (*Server).statusLeader},
	{method: get, pattern: "/v1/status/peers", capability: open, handle: (*Server).statusPeers},
	{method: get, pattern: "/v1/regions", capability: open, handle: (*Server).regions},
	{method: get, pattern: "/v1/agent/self", capability: agentRead, handle: (*Server).agentSelf},
	{method: get, pattern: "/v1/agent/members", capability: agentRead, handle: (*Server).agentMembers},
	{method: get, pattern: "/v1/agent/health", capability: open, handle: (*Server).agentHealth},
	{method: get, pattern: "/v1/agent/servers", capability: agentRead, handle: (*Server).statusPeers},
	{method: anyMethod, pattern: "/v1/agent/servers", capability: agentWrite, handle: later("telling an agent its servers at run time")},
	{method: anyMethod, pattern: "/v1/agent/join", capability: agentWrite, handle: later("joining servers at run time")},
	{method: anyMethod, pattern: "/v1/agent/force-leave", capability: agentWrite, handle: later("removing servers at run time")},
	{method: get, pattern: "/v1/agent/monitor", capability: agentRead, handle: later("streaming a server's own log")},
	{method: get, pattern: "/v1/agent/host", capability: agentRead, handle: later("host details for nomad operator debug")},
	{method: get, pattern: "/v1/agent/pprof/:profile", capability: agentWrite, handle: later("profiles over this API")},
	{method: anyMethod, pattern: "/v1/agent/keyring/:op", capability: agentWrite, handle: later("gossip and its keys")},
	{method: anyMethod, pattern: "/v1/agent/schedulers", capability: agentRead, handle: later("settings of scheduler workers")},
	{method: anyMethod, pattern: "/v1/agent/schedulers/config", capability: agentRead, handle: later("settings of scheduler workers")},
	{method: get, pattern: "/v1/metrics", capability: open, handle: (*Server).readMetrics},
	{method: get, pattern: "/v1/operator/raft/configuration", capability: management, handle: (*Server).raftConfiguration},
	{method: del, pattern: "/v1/operator/raft/peer", capability: management, handle: (*Server).removePeer},
	{method: put, pattern: "/v1/operator/raft/transfer-leadership", capability: management, handle: (*Server).transferLeadership},
	{method: get, pattern: "/v1/operator/snapshot", capability: management, handle: (*Server).saveSnapshot},
	{method: put, pattern: "/v1/operator/snapshot", capability: management, handle: (*Server).restoreSnapshot},
	{method: get, pattern: "/v1/operator/scheduler/configuration", capability: operatorRead, handle: (*Server).schedulerConfig},
	{method: put, pattern: "/v1/operator/scheduler/configuration", capability: operatorWrite, handle: (*Server).setSchedulerConfig},
	{method: get, pattern: "/v1/operator/autopilot/configuration", capability: operatorRead, handle: (*Server).autopilotConfig},
	{method: put, pattern: "/v1/operator/autopilot/configuration", capability: operatorWrite, handle: (*Server).setAutopilotConfig},
	{method: get, pattern: "/v1/operator/autopilot/health", capability: operatorRead, handle: (*Server).autopilotHealth},
	{method: anyMethod, pattern: "/v1/operator/keyring/*op", capability: management, handle: later("the keyring")},
	{method: anyMethod, pattern: "/v1/operator/utilization", capability: operatorWrite, handle: enterprise},
	{method: get, pattern: "/v1/operator/license", capability: operatorRead, handle: noLicense},
	{method: put, pattern: "/v1/operator/upgrade-check/:what", capability: management, handle: later("upgrade checks")},
	{method: put, pattern: "/v1/system/gc", capability: management, handle: later("collecting on demand")},
	{method: put, pattern: "/v1/system/reconcile/summaries", capability: management, handle: later("counting summaries anew; every change keeps them true")},
	{method: put, pattern: "/v1/search", capability: open, handle: (*Server).search},
	{method: put, pattern: "/v1/search/fuzzy", capability: open, handle: later("fuzzy search")},
	{method: get, pattern: "/v1/event/stream", capability: open, handle: later("the event stream; use blocking queries")},
	{method: anyMethod, pattern: "/v1/acl/*what", capability: open, handle: noACL},

	// What this version has exactly one of, or none.
	{method: get, pattern: "/v1/namespaces", capability: open, handle: (*Server).listNamespaces},
	{method: put, pattern: "/v1/namespaces", capability: management, handle: later("namespaces besides default")},
	{method: put, pattern: "/v1/namespace", capability: management, handle: later("namespaces besides default")},
	{method: get, pattern: "/v1/namespace/:name", capability: open, handle: (*Server).readNamespace},
	{method: put, pattern: "/v1/namespace/:name", capability: management, handle: later("namespaces besides default")},
	{method: del, pattern: "/v1/namespace/:name", capability: management, handle: (*Server).deleteNamespace},
	{method: get, pattern: "/v1/services", capability: readJob, handle: none},
	{method: get, pattern: "/v1/service/:name", capability: readJob, handle: none},
	{method: del, pattern: "/v1/service/:name/:id", capability: submitJob, handle: later("service registrations")},
	{method: get, pattern: "/v1/vars", capability: variablesRead, handle: none},
	{method: get, pattern: "/v1/var/*path", capability: variablesRead, handle: noVariable},
	{method: anyMethod, pattern: "/v1/var/*path", capability: variablesWrite, handle: later("variables")},
	{method: get, pattern: "/v1/volumes", capability: csiListVolume, handle: none},
	{method: anyMethod, pattern: "/v1/volumes/*what", capability: csiWriteVolume, handle: later("volumes")},
	{method: anyMethod, pattern: "/v1/volume/*what", capability: csiWriteVolume, handle: later("volumes")},
	{method: get, pattern: "/v1/plugins", capability: pluginList, handle: none},
	{method: anyMethod, pattern: "/v1/plugin/*what", capability: pluginList, handle: later("storage plugins")},
	{method: get, pattern: "/v1/scaling/policies", capability: listScaling, handle: none},
	{method: get, pattern: "/v1/scaling/policy/:id", capability: readScaling, handle: noPolicy},
	{method: anyMethod, pattern: "/v1/quotas", capability: quotaRead, handle: later("quotas")},
	{method: anyMethod, pattern: "/v1/quota-usages", capability: quotaRead, handle: later("quotas")},
	{method: anyMethod, pattern: "/v1/quota", capability: quotaWrite, handle: later("quotas")},
	{method: anyMethod, pattern: "/v1/quota/*what", capability: quotaWrite, handle: later("quotas")},
	{method: anyMethod, pattern: "/v1/sentinel/*what", capability: management, handle: enterprise},
	{method: anyMethod, pattern: "/v1/recommendations", capability: recommendations, handle: enterprise},
	{method: anyMethod, pattern: "/v1/recommendations/*what", capability: recommendations, handle: enterprise},
	{method: anyMethod, pattern: "/v1/recommendation/*what", capability: recommendations, handle: enterprise},

	// Our own.
	{method: get, pattern: "/v1/models", capability: modelRead, handle: (*Server).listModels},
	{method: get, pattern: "/v1/models/:model", capability: modelRead, handle: (*Server).readModel},
	{method: put, pattern: "/v1/models/:model", capability: modelWrite, handle: (*Server).pushModel},
	{method: get, pattern: "/v1/models/:model/versions/:version", capability: modelRead, handle: (*Server).readModelVersion},
	{method: put, pattern: "/v1/models/:model/alias/:alias", capability: modelWrite, handle: (*Server).setAlias},
	{method: del, pattern: "/v1/models/:model/alias/:alias", capability: modelWrite, handle: (*Server).deleteAlias},
	{method: get, pattern: "/v1/artifacts/:digest", capability: modelRead, handle: (*Server).readArtifact},
}

// later answers for what Nomad has and this version has not.
func later(what string) func(*Server, *request) (any, error) {
	err := notBuilt("this version of rxvision does not support %s", what)
	return func(*Server, *request) (any, error) { return nil, err }
}

func enterprise(*Server, *request) (any, error) { return nil, errEnt }

func noACL(*Server, *request) (any, error) { return nil, errNoACL }

func noLicense(*Server, *request) (any, error) { return &answer{status: http.StatusNoContent}, nil }

// none answers a list of what cannot exist in this version.
func none(s *Server, r *request) (any, error) {
	if err := s.waitLeader(r); err != nil {
		return nil, err
	}
	return &answer{body: []any{}, read: true}, nil
}

func noVariable(*Server, *request) (any, error) {
	return &answer{read: true, err: notFound("variable not found")}, nil
}

func noPolicy(*Server, *request) (any, error) {
	return &answer{read: true, err: notFound("policy not found")}, nil
}
