package api

import (
	"net/http"

	"github.com/rxvision/rxvision/acl"
)

const (
	get       = http.MethodGet
	put       = http.MethodPut
	del       = http.MethodDelete
	anyMethod = ""
)

// routes is every route of the server.
var routes = []route{
	{method: get, pattern: "/", access: need(open), handle: (*Server).frontPage},
	{method: get, pattern: "/.well-known/jwks.json", access: need(open), handle: later("workload identities and their keys")},

	// Jobs.
	{method: get, pattern: "/v1/jobs", access: need(someplace, acl.ListJobs), handle: (*Server).listJobs},
	{method: put, pattern: "/v1/jobs", access: need(ofBody, acl.SubmitJob), handle: (*Server).registerJob},
	{method: put, pattern: "/v1/jobs/parse", access: need(ofRequest, acl.ParseJob), handle: (*Server).parseJob},
	{method: anyMethod, pattern: "/v1/jobs/statuses", access: need(someplace, acl.ListJobs), handle: later("the job list of Nomad's console")},
	{method: put, pattern: "/v1/jobs/what-if", access: need(ofBody, acl.SubmitJob), handle: (*Server).whatIf}, // our own
	{method: put, pattern: "/v1/validate/job", access: need(ofBody, acl.ReadJob), handle: (*Server).validateJob},
	{method: put, pattern: "/v1/job/*job/plan", access: need(ofBody, acl.SubmitJob), handle: (*Server).planJob},
	{method: put, pattern: "/v1/job/*job/evaluate", access: need(ofRequest, acl.SubmitJob), handle: (*Server).evaluateJob},
	{method: put, pattern: "/v1/job/*job/revert", access: need(ofRequest, acl.SubmitJob), handle: (*Server).revertJob},
	{method: put, pattern: "/v1/job/*job/stable", access: need(ofRequest, acl.SubmitJob), handle: (*Server).setStable},
	{method: put, pattern: "/v1/job/*job/scale", access: need(ofRequest, acl.ScaleJob, acl.SubmitJob), handle: (*Server).scaleJob},
	{method: get, pattern: "/v1/job/*job/scale", access: need(ofRequest, acl.ReadJobScaling, acl.ReadJob), handle: (*Server).scaleStatus},
	{method: put, pattern: "/v1/job/*job/dispatch", access: need(ofRequest, acl.DispatchJob), handle: (*Server).dispatchJob},
	{method: put, pattern: "/v1/job/*job/periodic/force", access: need(ofRequest, acl.DispatchJob, acl.SubmitJob), handle: (*Server).forceLaunch},
	{method: put, pattern: "/v1/job/*job/versions/:tag/tag", access: need(ofRequest, acl.SubmitJob), handle: (*Server).tagVersion},
	{method: del, pattern: "/v1/job/*job/versions/:tag/tag", access: need(ofRequest, acl.SubmitJob), handle: (*Server).untagVersion},
	{method: get, pattern: "/v1/job/*job/action", access: need(ofRequest, acl.AllocExec), handle: later("job actions")},
	{method: get, pattern: "/v1/job/*job/allocations", access: need(ofRequest, acl.ReadJob), handle: (*Server).jobAllocs},
	{method: get, pattern: "/v1/job/*job/evaluations", access: need(ofRequest, acl.ReadJob), handle: (*Server).jobEvals},
	{method: get, pattern: "/v1/job/*job/deployments", access: need(ofRequest, acl.ReadJob), handle: (*Server).jobDeployments},
	{method: get, pattern: "/v1/job/*job/deployment", access: need(ofRequest, acl.ReadJob), handle: (*Server).jobDeployment},
	{method: get, pattern: "/v1/job/*job/summary", access: need(ofRequest, acl.ReadJob), handle: (*Server).jobSummary},
	{method: get, pattern: "/v1/job/*job/versions", access: need(ofRequest, acl.ReadJob), handle: (*Server).jobVersions},
	{method: get, pattern: "/v1/job/*job/submission", access: need(ofRequest, acl.ReadJob), handle: (*Server).jobSubmission},
	{method: get, pattern: "/v1/job/*job/explain", access: need(ofRequest, acl.ReadJob), handle: (*Server).explainJob}, // our own
	{method: get, pattern: "/v1/job/*job/services", access: need(ofRequest, acl.ReadJob), handle: (*Server).jobServices},
	{method: get, pattern: "/v1/job/*job", access: need(ofRequest, acl.ReadJob), handle: (*Server).readJob},
	{method: put, pattern: "/v1/job/*job", access: need(ofBody, acl.SubmitJob), handle: (*Server).registerJob},
	{method: del, pattern: "/v1/job/*job", access: need(ofRequest, acl.SubmitJob), handle: (*Server).deregisterJob},

	// Evaluations and deployments.
	{method: get, pattern: "/v1/evaluations", access: need(someplace, acl.ReadJob), handle: (*Server).listEvals},
	{method: del, pattern: "/v1/evaluations", access: need(region, acl.Management), handle: later("deleting evaluations; old ones are collected by the servers")},
	{method: get, pattern: "/v1/evaluations/count", access: need(someplace, acl.ReadJob), handle: (*Server).countEvals},
	{method: get, pattern: "/v1/evaluation/:id", access: need(ofEval, acl.ReadJob), handle: (*Server).readEval},
	{method: get, pattern: "/v1/evaluation/:id/allocations", access: need(ofEval, acl.ReadJob), handle: (*Server).evalAllocs},
	{method: get, pattern: "/v1/deployments", access: need(someplace, acl.ReadJob), handle: (*Server).listDeployments},
	{method: get, pattern: "/v1/deployment/:id", access: need(ofDeployment, acl.ReadJob), handle: (*Server).readDeployment},
	{method: get, pattern: "/v1/deployment/allocations/:id", access: need(ofDeployment, acl.ReadJob), handle: (*Server).deploymentAllocs},
	{method: put, pattern: "/v1/deployment/fail/:id", access: need(ofDeployment, acl.SubmitJob), handle: (*Server).failDeployment},
	{method: put, pattern: "/v1/deployment/pause/:id", access: need(ofDeployment, acl.SubmitJob), handle: (*Server).pauseDeployment},
	{method: put, pattern: "/v1/deployment/promote/:id", access: need(ofDeployment, acl.SubmitJob), handle: (*Server).promoteDeployment},
	{method: put, pattern: "/v1/deployment/unblock/:id", access: need(ofDeployment, acl.SubmitJob), handle: (*Server).unblockDeployment},
	{method: put, pattern: "/v1/deployment/allocation-health/:id", access: need(ofDeployment, acl.SubmitJob), handle: (*Server).setHealth},

	// Allocations.
	{method: get, pattern: "/v1/allocations", access: need(someplace, acl.ReadJob), handle: (*Server).listAllocs},
	{method: get, pattern: "/v1/allocation/:id", access: need(ofAlloc, acl.ReadJob), handle: (*Server).readAlloc},
	{method: put, pattern: "/v1/allocation/:id/stop", access: need(ofAlloc, acl.AllocLifecycle), handle: (*Server).stopAlloc},
	{method: get, pattern: "/v1/allocation/:id/services", access: need(ofAlloc, acl.ReadJob), handle: (*Server).allocServices},

	// Through the servers to nodes.
	{method: get, pattern: "/v1/client/fs/logs/:id", access: need(ofAlloc, acl.ReadLogs, acl.ReadFS), handle: (*Server).logs},
	{method: get, pattern: "/v1/client/fs/stat/:id", access: need(ofAlloc, acl.ReadFS), handle: (*Server).statFile},
	{method: get, pattern: "/v1/client/fs/ls/:id", access: need(ofAlloc, acl.ReadFS), handle: (*Server).listFiles},
	{method: get, pattern: "/v1/client/fs/cat/:id", access: need(ofAlloc, acl.ReadFS), handle: (*Server).catFile},
	{method: get, pattern: "/v1/client/fs/readat/:id", access: need(ofAlloc, acl.ReadFS), handle: (*Server).readFileAt},
	{method: get, pattern: "/v1/client/fs/stream/:id", access: need(ofAlloc, acl.ReadFS), handle: (*Server).streamFile},
	{method: get, pattern: "/v1/client/allocation/:id/stats", access: need(ofAlloc, acl.ReadJob), handle: (*Server).allocStats},
	{method: get, pattern: "/v1/client/allocation/:id/checks", access: need(ofAlloc, acl.ReadJob), handle: (*Server).allocChecks},
	{method: put, pattern: "/v1/client/allocation/:id/restart", access: need(ofAlloc, acl.AllocLifecycle), handle: (*Server).restartAlloc},
	{method: put, pattern: "/v1/client/allocation/:id/signal", access: need(ofAlloc, acl.AllocLifecycle), handle: (*Server).signalAlloc},
	{method: get, pattern: "/v1/client/allocation/:id/exec", access: need(ofAlloc, acl.AllocExec), handle: later("exec into an allocation")},
	{method: anyMethod, pattern: "/v1/client/allocation/:id/pause", access: need(ofAlloc, acl.AllocLifecycle), handle: enterprise},
	{method: anyMethod, pattern: "/v1/client/allocation/:id/gc", access: need(region, acl.NodeWrite), handle: later("collecting one allocation; nodes collect by themselves")},
	{method: anyMethod, pattern: "/v1/client/gc", access: need(region, acl.NodeWrite), handle: later("collecting on demand; nodes collect by themselves")},
	{method: get, pattern: "/v1/client/stats", access: need(region, acl.NodeRead), handle: (*Server).nodeStats},
	{method: anyMethod, pattern: "/v1/client/metadata", access: need(region, acl.NodeWrite), handle: later("dynamic node metadata")},

	// Nodes.
	{method: get, pattern: "/v1/nodes", access: need(region, acl.NodeRead), handle: (*Server).listNodes},
	{method: get, pattern: "/v1/node/pools", access: need(visible, acl.NodePoolRead), handle: (*Server).listPools},
	{method: put, pattern: "/v1/node/pools", access: need(someplace, acl.NodePoolWrite), handle: later("node pools of your own")},
	{method: get, pattern: "/v1/node/pool/:pool", access: need(ofPool, acl.NodePoolRead), handle: (*Server).readPool},
	{method: put, pattern: "/v1/node/pool/:pool", access: need(ofPool, acl.NodePoolWrite), handle: later("node pools of your own")},
	{method: del, pattern: "/v1/node/pool/:pool", access: need(ofPool, acl.NodePoolDelete), handle: later("node pools of your own")},
	{method: get, pattern: "/v1/node/pool/:pool/nodes", access: need(ofPool).orAll(acl.NodePoolRead, acl.NodeRead), handle: (*Server).poolNodes},
	{method: get, pattern: "/v1/node/pool/:pool/jobs", access: need(ofPool, acl.NodePoolRead), handle: (*Server).poolJobs},
	{method: get, pattern: "/v1/node/:id", access: need(region, acl.NodeRead), handle: (*Server).readNode},
	{method: get, pattern: "/v1/node/:id/allocations", access: need(region, acl.NodeRead), handle: (*Server).nodeAllocs},
	{method: put, pattern: "/v1/node/:id/eligibility", access: need(region, acl.NodeWrite), handle: (*Server).setEligibility},
	{method: put, pattern: "/v1/node/:id/drain", access: need(region, acl.NodeWrite), handle: (*Server).drainNode},
	{method: put, pattern: "/v1/node/:id/evaluate", access: need(region, acl.NodeWrite), handle: (*Server).evaluateNode},
	{method: put, pattern: "/v1/node/:id/purge", access: need(region, acl.NodeWrite), handle: (*Server).purgeNode},

	// Cluster and operator.
	{method: get, pattern: "/v1/status/leader", access: need(open), handle: (*Server).statusLeader},
	{method: get, pattern: "/v1/status/peers", access: need(open), handle: (*Server).statusPeers},
	{method: get, pattern: "/v1/regions", access: need(open), handle: (*Server).regions},
	{method: get, pattern: "/v1/agent/self", access: need(region, acl.AgentRead), handle: (*Server).agentSelf},
	{method: get, pattern: "/v1/agent/members", access: need(region, acl.AgentRead, acl.NodeRead), handle: (*Server).agentMembers},
	{method: get, pattern: "/v1/agent/health", access: need(open), handle: (*Server).agentHealth},
	{method: get, pattern: "/v1/agent/servers", access: need(region, acl.AgentRead), handle: (*Server).statusPeers},
	{method: anyMethod, pattern: "/v1/agent/servers", access: need(region, acl.AgentWrite), handle: later("telling an agent its servers at run time")},
	{method: anyMethod, pattern: "/v1/agent/join", access: need(region, acl.AgentWrite), handle: later("joining servers at run time")},
	{method: put, pattern: "/v1/agent/force-leave", access: need(region, acl.AgentWrite), handle: (*Server).forceLeave},
	{method: put, pattern: "/v1/agent/leave", access: need(region, acl.AgentWrite), handle: (*Server).leave},
	{method: get, pattern: "/v1/agent/monitor", access: need(region, acl.AgentRead), handle: later("streaming a server's own log")},
	{method: get, pattern: "/v1/agent/host", access: need(region, acl.AgentRead), handle: later("host details for nomad operator debug")},
	{method: get, pattern: "/v1/agent/pprof/:profile", access: need(region, acl.AgentWrite), handle: later("profiles over this API")},
	{method: anyMethod, pattern: "/v1/agent/keyring/:op", access: need(region, acl.AgentWrite), handle: later("gossip and its keys")},
	{method: anyMethod, pattern: "/v1/agent/schedulers", access: need(region, acl.AgentRead), handle: later("settings of scheduler workers")},
	{method: anyMethod, pattern: "/v1/agent/schedulers/config", access: need(region, acl.AgentRead), handle: later("settings of scheduler workers")},
	{method: get, pattern: "/v1/metrics", access: need(open), handle: (*Server).readMetrics},
	{method: get, pattern: "/v1/operator/raft/configuration", access: need(region, acl.Management), handle: (*Server).raftConfiguration},
	{method: del, pattern: "/v1/operator/raft/peer", access: need(region, acl.Management), handle: (*Server).removePeer},
	{method: put, pattern: "/v1/operator/raft/transfer-leadership", access: need(region, acl.Management), handle: (*Server).transferLeadership},
	{method: get, pattern: "/v1/operator/snapshot", access: need(region, acl.Management), handle: (*Server).saveSnapshot},
	{method: put, pattern: "/v1/operator/snapshot", access: need(region, acl.Management), handle: (*Server).restoreSnapshot},
	{method: get, pattern: "/v1/operator/state-hash", access: need(region, acl.Management), handle: (*Server).stateHash},
	{method: get, pattern: "/v1/operator/scheduler/configuration", access: need(region, acl.OperatorRead), handle: (*Server).schedulerConfig},
	{method: put, pattern: "/v1/operator/scheduler/configuration", access: need(region, acl.OperatorWrite), handle: (*Server).setSchedulerConfig},
	{method: get, pattern: "/v1/operator/autopilot/configuration", access: need(region, acl.OperatorRead), handle: (*Server).autopilotConfig},
	{method: put, pattern: "/v1/operator/autopilot/configuration", access: need(region, acl.OperatorWrite), handle: (*Server).setAutopilotConfig},
	{method: get, pattern: "/v1/operator/autopilot/health", access: need(region, acl.OperatorRead), handle: (*Server).autopilotHealth},
	{method: anyMethod, pattern: "/v1/operator/keyring/*op", access: need(region, acl.Management), handle: later("the keyring")},
	{method: anyMethod, pattern: "/v1/operator/utilization", access: need(region, acl.OperatorWrite), handle: enterprise},
	{method: get, pattern: "/v1/operator/license", access: need(region, acl.OperatorRead), handle: noLicense},
	{method: put, pattern: "/v1/operator/upgrade-check/:what", access: need(region, acl.Management), handle: later("upgrade checks")},
	{method: put, pattern: "/v1/system/gc", access: need(region, acl.Management), handle: (*Server).collect},
	{method: put, pattern: "/v1/system/reconcile/summaries", access: need(region, acl.Management), handle: later("counting summaries anew; every change keeps them true")},
	{method: put, pattern: "/v1/search", access: need(visible), handle: (*Server).search},
	{method: put, pattern: "/v1/search/fuzzy", access: need(visible), handle: later("fuzzy search")},
	{method: get, pattern: "/v1/event/stream", access: need(visible), handle: later("the event stream; use blocking queries")},

	// Access control.
	{method: put, pattern: "/v1/acl/bootstrap", access: need(open), handle: ifACL((*Server).bootstrapACL)},
	{method: get, pattern: "/v1/acl/policies", access: need(own), handle: ifACL((*Server).listPolicies)},
	{method: get, pattern: "/v1/acl/policy/self", access: need(own), handle: ifACL((*Server).ownPolicies)},
	{method: get, pattern: "/v1/acl/policy/:name", access: need(own), handle: ifACL((*Server).readPolicy)},
	{method: put, pattern: "/v1/acl/policy/:name", access: need(region, acl.Management), handle: ifACL((*Server).putPolicy)},
	{method: del, pattern: "/v1/acl/policy/:name", access: need(region, acl.Management), handle: ifACL((*Server).deletePolicy)},
	{method: get, pattern: "/v1/acl/tokens", access: need(region, acl.Management), handle: ifACL((*Server).listTokens)},
	{method: put, pattern: "/v1/acl/token", access: need(region, acl.Management), handle: ifACL((*Server).createToken)},
	{method: get, pattern: "/v1/acl/token/self", access: need(own), handle: ifACL((*Server).ownToken)},
	{method: anyMethod, pattern: "/v1/acl/token/onetime", access: need(open), handle: ifACL(later("one-time tokens"))},
	{method: anyMethod, pattern: "/v1/acl/token/onetime/exchange", access: need(open), handle: ifACL(later("one-time tokens"))},
	{method: get, pattern: "/v1/acl/token/:accessor", access: need(own), handle: ifACL((*Server).readToken)},
	{method: put, pattern: "/v1/acl/token/:accessor", access: need(region, acl.Management), handle: ifACL((*Server).updateToken)},
	{method: del, pattern: "/v1/acl/token/:accessor", access: need(region, acl.Management), handle: ifACL((*Server).deleteToken)},
	{method: anyMethod, pattern: "/v1/acl/*what", access: need(open), handle: ifACL(later("ACL roles, auth methods, binding rules and login"))},

	// What this version has exactly one of, or none.
	{method: get, pattern: "/v1/namespaces", access: need(visible, acl.AnyInNamespace), handle: (*Server).listNamespaces},
	{method: put, pattern: "/v1/namespaces", access: need(region, acl.Management), handle: (*Server).putNamespace},
	{method: put, pattern: "/v1/namespace", access: need(region, acl.Management), handle: (*Server).putNamespace},
	{method: get, pattern: "/v1/namespace/:name", access: need(ofNamespace, acl.AnyInNamespace), handle: (*Server).readNamespace},
	{method: put, pattern: "/v1/namespace/:name", access: need(region, acl.Management), handle: (*Server).putNamespace},
	{method: del, pattern: "/v1/namespace/:name", access: need(region, acl.Management), handle: (*Server).deleteNamespace},
	{method: get, pattern: "/v1/services", access: need(someplace, acl.ReadJob), handle: (*Server).listServices},
	{method: get, pattern: "/v1/service/:name", access: need(ofRequest, acl.ReadJob), handle: (*Server).readService},
	{method: del, pattern: "/v1/service/:name/:id", access: need(ofRequest, acl.SubmitJob), handle: (*Server).deregisterService},
	{method: get, pattern: "/v1/vars", access: need(visible, acl.VariablesList), handle: none},
	{method: get, pattern: "/v1/var/*path", access: need(ofVariable, acl.VariablesRead), handle: noVariable},
	{method: anyMethod, pattern: "/v1/var/*path", access: need(ofVariable, acl.VariablesWrite), handle: later("variables")},
	{method: get, pattern: "/v1/volumes", access: need(someplace, acl.CSIListVolume), handle: none},
	{method: anyMethod, pattern: "/v1/volumes/*what", access: need(ofRequest, acl.CSIWriteVolume), handle: later("volumes")},
	{method: anyMethod, pattern: "/v1/volume/*what", access: need(ofRequest, acl.CSIWriteVolume), handle: later("volumes")},
	{method: get, pattern: "/v1/plugins", access: need(region, acl.PluginList), handle: none},
	{method: anyMethod, pattern: "/v1/plugin/*what", access: need(region, acl.PluginList), handle: later("storage plugins")},
	{method: get, pattern: "/v1/scaling/policies", access: need(someplace, acl.ListScalingPolicies).orAll(acl.ListJobs, acl.ReadJob), handle: (*Server).listScalingPolicies},
	{method: get, pattern: "/v1/scaling/policy/:id", access: need(ofRequest, acl.ReadScalingPolicy).orAll(acl.ListJobs, acl.ReadJob), handle: (*Server).readScalingPolicy},
	{method: get, pattern: "/v1/quotas", access: need(region, acl.QuotaRead), handle: (*Server).listQuotas},
	{method: get, pattern: "/v1/quota-usages", access: need(region, acl.QuotaRead), handle: (*Server).listUsages},
	{method: put, pattern: "/v1/quota", access: need(region, acl.QuotaWrite), handle: (*Server).putQuota},
	{method: get, pattern: "/v1/quota/usage/:name", access: need(region, acl.QuotaRead), handle: (*Server).readUsage},
	{method: get, pattern: "/v1/quota/:name", access: need(region, acl.QuotaRead), handle: (*Server).readQuota},
	{method: put, pattern: "/v1/quota/:name", access: need(region, acl.QuotaWrite), handle: (*Server).putQuota},
	{method: del, pattern: "/v1/quota/:name", access: need(region, acl.QuotaWrite), handle: (*Server).deleteQuota},
	{method: anyMethod, pattern: "/v1/sentinel/*what", access: need(region, acl.Management), handle: enterprise},
	{method: anyMethod, pattern: "/v1/recommendations", access: need(ofRequest, acl.SubmitRecommendations), handle: enterprise},
	{method: anyMethod, pattern: "/v1/recommendations/*what", access: need(ofRequest, acl.SubmitRecommendations), handle: enterprise},
	{method: anyMethod, pattern: "/v1/recommendation/*what", access: need(ofRequest, acl.SubmitRecommendations), handle: enterprise},

	// Our own.
	{method: get, pattern: "/v1/node/:id/devices", access: need(region, acl.NodeRead), handle: (*Server).listDevices},
	{method: put, pattern: "/v1/node/:id/devices", access: need(region, acl.NodeWrite), handle: (*Server).orderDevice},
	{method: put, pattern: "/v1/node/:id/interrupt", access: need(region, acl.NodeWrite), handle: (*Server).interruptNode},
	{method: get, pattern: "/v1/operator/hold", access: need(region, acl.OperatorRead), handle: (*Server).readHold},
	{method: del, pattern: "/v1/operator/hold", access: need(region, acl.OperatorWrite), handle: (*Server).releaseHold},
	{method: get, pattern: "/v1/intro-tokens", access: need(region, acl.OperatorRead), handle: (*Server).listIntroTokens},
	{method: put, pattern: "/v1/intro-tokens", access: need(region, acl.OperatorWrite), handle: (*Server).createIntroToken},
	{method: del, pattern: "/v1/intro-token/:id", access: need(region, acl.OperatorWrite), handle: (*Server).deleteIntroToken},
	{method: get, pattern: "/v1/enrollments", access: need(region, acl.OperatorRead), handle: (*Server).listEnrollments},
	{method: del, pattern: "/v1/enrollment/:role/:name", access: need(region, acl.OperatorWrite), handle: (*Server).deleteEnrollment},
	{method: get, pattern: "/v1/models", access: need(someplace, acl.ModelRead), handle: (*Server).listModels},
	{method: get, pattern: "/v1/models/:model", access: need(ofModel, acl.ModelRead), handle: (*Server).readModel},
	{method: put, pattern: "/v1/models/:model", access: need(ofModel, acl.ModelPush), handle: (*Server).pushModel},
	{method: get, pattern: "/v1/models/:model/versions/:version", access: need(ofModel, acl.ModelRead), handle: (*Server).readModelVersion},
	{method: put, pattern: "/v1/models/:model/alias/:alias", access: need(ofModel, acl.ModelAlias), handle: (*Server).setAlias},
	{method: del, pattern: "/v1/models/:model/alias/:alias", access: need(ofModel, acl.ModelAlias), handle: (*Server).deleteAlias},
	{method: get, pattern: "/v1/artifacts/:digest", access: need(ofArtifact, acl.ModelRead), handle: (*Server).readArtifact},
}

// later answers for what Nomad has and this version has not.
func later(what string) func(*Server, *request) (any, error) {
	err := notBuilt("this version of rxvision does not support %s", what)
	return func(*Server, *request) (any, error) { return nil, err }
}

func enterprise(*Server, *request) (any, error) { return nil, errEnt }

func noLicense(*Server, *request) (any, error) { return &answer{status: http.StatusNoContent}, nil }

// none answers a list of what cannot exist in this version.
func none(s *Server, r *request) (any, error) {
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	return &answer{body: []any{}, read: true}, nil
}

func noVariable(*Server, *request) (any, error) {
	return &answer{read: true, err: notFound("variable not found")}, nil
}
