package acl

import (
	"regexp"
	"slices"
)

// Capability is what a call needs: one of Nomad's in a namespace, as submit-job
// (https://developer.hashicorp.com/nomad/docs/other-specifications/acl-policy#capabilities),
// or one of another kind as KIND:CAPABILITY.
type Capability string

// The capabilities that calls of this version ask for.
const (
	// Management is held by management tokens alone.
	Management Capability = "management"
	// AnyInNamespace is held by who has any capability in the namespace.
	AnyInNamespace Capability = "namespace:any"

	ListJobs              Capability = "list-jobs"
	ReadJob               Capability = "read-job"
	SubmitJob             Capability = "submit-job"
	DispatchJob           Capability = "dispatch-job"
	ScaleJob              Capability = "scale-job"
	ParseJob              Capability = "parse-job"
	ReadLogs              Capability = "read-logs"
	ReadFS                Capability = "read-fs"
	AllocExec             Capability = "alloc-exec"
	AllocLifecycle        Capability = "alloc-lifecycle"
	ReadScalingPolicy     Capability = "read-scaling-policy"
	ListScalingPolicies   Capability = "list-scaling-policies"
	ReadJobScaling        Capability = "read-job-scaling"
	CSIListVolume         Capability = "csi-list-volume"
	CSIWriteVolume        Capability = "csi-write-volume"
	SubmitRecommendations Capability = "submit-recommendation"

	VariablesList  Capability = "variables:list"
	VariablesRead  Capability = "variables:read"
	VariablesWrite Capability = "variables:write"

	NodePoolRead   Capability = "node_pool:read"
	NodePoolWrite  Capability = "node_pool:write"
	NodePoolDelete Capability = "node_pool:delete"

	ModelRead  Capability = "model:read"  // what it is, and its bytes
	ModelInfer Capability = "model:infer" // ask it
	ModelPush  Capability = "model:push"  // add versions
	ModelAlias Capability = "model:alias" // move and remove aliases

	NodeRead      Capability = "node:read"
	NodeWrite     Capability = "node:write"
	AgentRead     Capability = "agent:read"
	AgentWrite    Capability = "agent:write"
	OperatorRead  Capability = "operator:read"
	OperatorWrite Capability = "operator:write"
	QuotaRead     Capability = "quota:read"
	QuotaWrite    Capability = "quota:write"
	PluginList    Capability = "plugin:list"
)

// Known says whether c is a capability at all.
func Known(c Capability) bool { _, ok := places[c]; return ok || c == Management }

// set is capabilities of one kind, a bit each.
type set uint64

// denied is the bit of deny, which every kind has.
const denied set = 1

// kind is one kind of block: what its rules may say.
type kind struct {
	block string
	name  *regexp.Regexp // of its label; nil: it has none
	caps  []string
	// policies are the shorthands for capabilities.
	policies map[string][]string
	// implied are the capabilities that come with another one.
	implied map[string][]string
	// coarse: a rule has a policy and no capabilities.
	coarse bool
}

const deny = "deny"

var (
	readJobs = []string{
		"list-jobs", "parse-job", "read-job", "csi-list-volume", "csi-read-volume", "read-job-scaling",
		"list-scaling-policies", "read-scaling-policy", "host-volume-read",
	}
	scaleJobs = []string{
		"list-scaling-policies", "read-scaling-policy", "read-job-scaling", "scale-job", "read-job", "submit-recommendation",
	}
	writeJobs = append(slices.Clone(readJobs),
		"scale-job", "submit-job", "dispatch-job", "read-logs", "read-fs", "alloc-exec", "alloc-lifecycle",
		"csi-mount-volume", "csi-write-volume", "submit-recommendation", "host-volume-create")
)

var levels = map[string][]string{"read": {"read"}, "write": {"read", "write"}, deny: {deny}}

func level(block string) *kind {
	return &kind{block: block, caps: []string{"read", "write"}, policies: levels, coarse: true}
}

var (
	ofNamespace = &kind{
		block: "namespace", name: regexp.MustCompile(`^[a-zA-Z0-9*-]{1,128}$`),
		caps: append(slices.Clone(writeJobs), "alloc-node-exec", "sentinel-override", "csi-register-plugin",
			"host-volume-register", "host-volume-write", "host-volume-delete"),
		policies: map[string][]string{"read": readJobs, "write": writeJobs, "scale": scaleJobs, deny: {deny}},
		implied: map[string][]string{
			"host-volume-create":   {"host-volume-read"},
			"host-volume-register": {"host-volume-create", "host-volume-read"},
			"host-volume-write":    {"host-volume-register", "host-volume-create", "host-volume-delete", "host-volume-read"},
		},
	}
	ofVariables = &kind{
		block: "path", name: regexp.MustCompile(`^[^\x00]{1,512}$`), caps: []string{"read", "list", "write", "destroy"},
		implied: map[string][]string{"read": {"list"}},
	}
	ofNodePool = &kind{
		block: "node_pool", name: regexp.MustCompile(`^[a-zA-Z0-9_*-]{1,128}$`), caps: []string{"delete", "read", "write"},
		policies: map[string][]string{"read": {"read"}, "write": {"delete", "read", "write"}, deny: {deny}},
	}
	ofHostVolume = &kind{
		block: "host_volume", name: regexp.MustCompile(`^[a-zA-Z0-9*-]{1,128}$`), caps: []string{"mount-readonly", "mount-readwrite"},
		policies: map[string][]string{"read": {"mount-readonly"}, "write": {"mount-readonly", "mount-readwrite"}, deny: {deny}},
	}
	ofModel = &kind{
		block: "model", name: regexp.MustCompile(`^[a-zA-Z0-9_.*-]{1,128}$`), caps: []string{"read", "infer", "push", "alias"},
		policies: map[string][]string{"read": {"read"}, "write": {"read", "infer", "push", "alias"}, deny: {deny}},
	}
	ofNode, ofAgent, ofOperator, ofQuota = level("node"), level("agent"), level("operator"), level("quota")

	ofPlugin = &kind{
		block: "plugin", caps: []string{"list", "read"}, coarse: true,
		policies: map[string][]string{"list": {"list"}, "read": {"list", "read"}, "write": {"list", "read"}, deny: {deny}},
	}

	// blocks are the kinds that stand at the top of a policy.
	blocks = []*kind{ofNamespace, ofNodePool, ofHostVolume, ofModel, ofNode, ofAgent, ofOperator, ofQuota, ofPlugin}
)

// bit gives the bit of a capability's name in its kind, 0 for an unknown one.
func (k *kind) bit(name string) set {
	if name == deny {
		return denied
	}
	i := slices.Index(k.caps, name)
	if i < 0 {
		return 0
	}
	return denied << (i + 1)
}

// place is where a capability lives: its kind and its bits, of which one suffices.
type place struct {
	kind *kind
	bits set
}

var places = func() map[Capability]place {
	out := map[Capability]place{AnyInNamespace: {ofNamespace, ^denied}}
	for _, name := range ofNamespace.caps {
		out[Capability(name)] = place{ofNamespace, ofNamespace.bit(name)}
	}
	for prefix, k := range map[string]*kind{
		"variables": ofVariables, "node_pool": ofNodePool, "host_volume": ofHostVolume, "model": ofModel, "node": ofNode,
		"agent": ofAgent, "operator": ofOperator, "quota": ofQuota, "plugin": ofPlugin,
	} {
		for _, name := range k.caps {
			out[Capability(prefix+":"+name)] = place{k, k.bit(name)}
		}
	}
	return out
}()
