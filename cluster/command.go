package cluster

import (
	"encoding/json"
	"fmt"
	"slices"
)

// Kind is the first byte of a log entry. Kinds are append-only: a number is
// never reused. A server that meets an unknown kind must stop.
type Kind byte

// The kinds.
const (
	KindRegisterNode       Kind = 1
	KindUpdateNodeStatus   Kind = 2
	KindUpdateEligibility  Kind = 3
	KindUpdateDrain        Kind = 4
	KindRegisterJob        Kind = 5
	KindDeregisterJob      Kind = 6
	KindUpdateEvals        Kind = 7
	KindApplyPlans         Kind = 8
	KindUpdateAllocs       Kind = 9
	KindUpdateTransitions  Kind = 10
	KindUpdateDeployment   Kind = 11
	KindCreateModelVersion Kind = 12
	KindSetAlias           Kind = 13
	KindSetSchedulerConfig Kind = 14
	KindReap               Kind = 15
	KindDeregisterNode     Kind = 16
	KindSetJobStability    Kind = 17
	KindRegisterServer     Kind = 18
	KindRemoveServer       Kind = 19
	KindSetAutopilotConfig Kind = 20

	KindBootstrapACL      Kind = 21
	KindUpsertACLPolicies Kind = 22
	KindDeleteACLPolicies Kind = 23
	KindUpsertACLTokens   Kind = 24
	KindDeleteACLTokens   Kind = 25
	KindCreateIntroToken  Kind = 26
	KindUseIntroToken     Kind = 27
	KindDeleteIntroTokens Kind = 28
	KindSetFleetHold      Kind = 29
	KindSetClusterMeta    Kind = 31
	KindDispatchJob       Kind = 32
	KindLaunchJob         Kind = 33

	KindUpsertNamespaces  Kind = 34
	KindDeleteNamespaces  Kind = 35
	KindUpsertQuotas      Kind = 36
	KindDeleteQuotas      Kind = 37
	KindTagVersion        Kind = 38
	KindPromoteDeployment Kind = 39
	KindOrderDevice       Kind = 40
	KindScaleJob          Kind = 41

	// What has many allocations, with these in the short form of snapshots: see encodeCommand.
	KindApplyPlansShort   Kind = 47
	KindUpdateAllocsShort Kind = 48
)

// Command changes the State. Its stamp comes from the proposer.
type Command interface {
	kind() Kind
	stamp() *Stamp
}

// Stamp is what a proposer adds to each command: RequestID (a UUID) makes a
// retry apply once, Time (unix nanoseconds) is the only clock the rules see. Rules is
// EncodeCommand's: a log is applied by the rules that it was written under, or what
// came of an entry would not be what later entries build on.
type Stamp struct {
	RequestID string
	Time      int64
	Rules     uint64 // 0: those before they were numbered
}

// Versions of the rules.
const (
	// rulesSparse creates fewer evaluations: one for each job of all nodes that fall
	// silent in one command, none for what runs on when a node is back, and none for
	// the health of an allocation when nothing is left to place. While replacements
	// pause, a job with an open evaluation gets none for a node that falls silent.
	rulesSparse = 1

	// rulesPreferences keeps the affinities and spreads of jobs. Servers from before
	// read a job without them.
	rulesPreferences = 2

	// rulesShares counts shares of devices. To older ones they are whole devices.
	rulesShares = 3

	// rulesChildren knows jobs with children. To older ones they are jobs like others.
	rulesChildren = 4

	// rulesEngine knows gangs, preemption, tenants, canaries, system jobs and orders about devices.
	rulesEngine = 5
	// rulesScaling knows services, limits of run times, checks of scaling policies, and plans and reports in their short
	// form. To older ones jobs have none of these.
	rulesScaling = 6
	// rulesMoves knows work that may be moved. To older ones it stays where it is.
	rulesMoves = 7

	// CurrentRules is the newest version, which this program knows.
	CurrentRules = rulesMoves
)

func (s *Stamp) stamp() *Stamp { return s }

// StampOf gives a command's stamp for its proposer to fill.
func StampOf(c Command) *Stamp { return c.stamp() }

// RegisterNode creates or refreshes a node; status and eligibility of a known
// node stay, but a node that was down becomes ready. One whose Revision is older than
// the known node's changes nothing.
type RegisterNode struct {
	Stamp
	Node    *Node
	KeyHash string // of the key that the node showed; it must be enrolled with it. "": not asked for
}

// UpdateNodeStatus sets the status of nodes; going down marks their allocations
// lost (by an evaluation of each job), coming back wakes blocked evaluations. A node
// of which something is still awaited (Snapshot.Awaited) becomes disconnected instead
// of down.
type UpdateNodeStatus struct {
	Stamp
	Updates []NodeStatusUpdate
}

// NodeStatusUpdate is one node's new status. With an Index it holds only while
// the node's ModifyIndex is that one: a node that came back meanwhile stays.
type NodeStatusUpdate struct {
	NodeID, Status, Message string
	Index                   uint64
}

// UpdateEligibility makes a node eligible or ineligible for new work.
type UpdateEligibility struct {
	Stamp
	NodeID, Eligibility string
}

// UpdateDrain starts (Strategy set), or ends (nil) a node's drain.
type UpdateDrain struct {
	Stamp
	NodeID       string
	Strategy     *DrainStrategy
	MarkEligible bool
	Complete     bool // the drain ended because the node is empty
	Meta         map[string]string
}

// DeregisterNode forgets a node (Nomad: node purge).
type DeregisterNode struct {
	Stamp
	NodeID string
}

// RegisterJob creates a job or its next version, with an evaluation unless it has
// children instead of allocations, in one entry. An identical specification keeps Version and JobModifyIndex. Models
// that onnx tasks name are resolved and pinned; an unknown one refuses the job.
type RegisterJob struct {
	Stamp
	Job            *Job
	Submission     *JobSubmission
	EnforceIndex   bool
	JobModifyIndex uint64 // compared when EnforceIndex; 0: the job must not exist
	PreserveCounts bool
	EvalID         string
	EvalPriority   int // 0: the job's
}

// DeregisterJob stops a job (a new version with Stop), or removes it whole when Purge.
type DeregisterJob struct {
	Stamp
	Namespace, JobID string
	Purge            bool
	EvalID           string
	EvalPriority     int
	NoShutdownDelay  bool
}

// UpdateEvals creates or updates evaluations.
type UpdateEvals struct {
	Stamp
	Evals []*Evaluation
}

// ApplyPlans commits plans, each checked for fit on its nodes. The Result says
// per plan which nodes were refused.
type ApplyPlans struct {
	Stamp
	Plans []*Plan
}

// UpdateAllocs brings what nodes say of their allocations. Of each record only
// ID, NodeID, Epoch, ClientStatus, ClientDescription, TaskStates, DeploymentStatus
// Revision, Serving and Checkpoints are read; an update with an older Epoch than the state's, with a
// Revision that is not newer, or with a NodeID that is not the allocation's, is ignored.
type UpdateAllocs struct {
	Stamp
	NodeID string // the node that speaks; updates for others are refused. "": the proposer has checked each
	Allocs []*Allocation
}

// UpdateTransitions sets desired transitions (alloc stop, drain) and creates evaluations.
type UpdateTransitions struct {
	Stamp
	Transitions map[string]DesiredTransition // by allocation ID
	Evals       []*Evaluation
}

// UpdateDeployment sets a deployment's status, or the health of its allocations.
type UpdateDeployment struct {
	Stamp
	Update *DeploymentStatusUpdate // Status "": it stays
	EvalID string                  // evaluation to create, "" for none
	// Healthy and Unhealthy are IDs of allocations that an operator has judged.
	Healthy   []string `json:",omitempty"`
	Unhealthy []string `json:",omitempty"`
}

// PromoteDeployment lets the canaries of a deployment take the place of the old version. All of a group must be healthy.
type PromoteDeployment struct {
	Stamp
	DeploymentID string
	Groups       []string // none: all that have canaries
	EvalID       string
}

// ScaleJob changes the count of one group, within the bounds of its policy, or only notes why it was not changed.
type ScaleJob struct {
	Stamp
	Namespace, JobID string
	Group            string
	Count            *int64 // nil: it stays
	Message          string
	Error            bool
	Meta             json.RawMessage `json:",omitempty"` // an object
	JobModifyIndex   uint64          // must be the job's; 0: whatever that is
	EvalID           string
}

// TagVersion names a version of a job, which is then kept; or takes a name away (Nomad: job tag).
type TagVersion struct {
	Stamp
	Namespace, JobID string
	Name             string
	Description      string
	Version          *uint64 // nil: the current one
	Unset            bool
}

// SetJobStability marks a job version stable or not.
type SetJobStability struct {
	Stamp
	Namespace, JobID string
	Version          uint64
	Stable           bool
}

// CreateModelVersion adds the next version of a model, creating the model if
// new. The same digest as an existing version of that model returns that one.
type CreateModelVersion struct {
	Stamp
	Version     *ModelVersion // Version 0: the next
	Description string
}

// SetAlias points an alias at a version, or removes it when Version is 0.
type SetAlias struct {
	Stamp
	Model, Alias string
	Version      uint64
}

// SetSchedulerConfig replaces the scheduler settings; with CheckIndex only if
// the current ModifyIndex equals Index.
type SetSchedulerConfig struct {
	Stamp
	Config     *SchedulerConfiguration
	CheckIndex bool
	Index      uint64
}

// Reap forgets terminal records by ID; live ones among them are kept.
type Reap struct {
	Stamp
	Evals, Allocs, Deployments []string
	Jobs                       []JobKey
	Versions                   []JobVersionKey // but not a job's current one
	Nodes                      []string        // that are down and hold nothing, or enrolled and never came
}

func (*RegisterNode) kind() Kind       { return KindRegisterNode }
func (*UpdateNodeStatus) kind() Kind   { return KindUpdateNodeStatus }
func (*UpdateEligibility) kind() Kind  { return KindUpdateEligibility }
func (*UpdateDrain) kind() Kind        { return KindUpdateDrain }
func (*DeregisterNode) kind() Kind     { return KindDeregisterNode }
func (*RegisterJob) kind() Kind        { return KindRegisterJob }
func (*DeregisterJob) kind() Kind      { return KindDeregisterJob }
func (*UpdateEvals) kind() Kind        { return KindUpdateEvals }
func (*ApplyPlans) kind() Kind         { return KindApplyPlans }
func (*UpdateAllocs) kind() Kind       { return KindUpdateAllocs }
func (*UpdateTransitions) kind() Kind  { return KindUpdateTransitions }
func (*UpdateDeployment) kind() Kind   { return KindUpdateDeployment }
func (*SetJobStability) kind() Kind    { return KindSetJobStability }
func (*PromoteDeployment) kind() Kind  { return KindPromoteDeployment }
func (*TagVersion) kind() Kind         { return KindTagVersion }
func (*ScaleJob) kind() Kind           { return KindScaleJob }
func (*CreateModelVersion) kind() Kind { return KindCreateModelVersion }
func (*SetAlias) kind() Kind           { return KindSetAlias }
func (*SetSchedulerConfig) kind() Kind { return KindSetSchedulerConfig }
func (*Reap) kind() Kind               { return KindReap }

// newCommand makes an empty command of a kind, nil for an unknown one.
func newCommand(k Kind) Command {
	switch k {
	case KindRegisterNode:
		return new(RegisterNode)
	case KindUpdateNodeStatus:
		return new(UpdateNodeStatus)
	case KindUpdateEligibility:
		return new(UpdateEligibility)
	case KindUpdateDrain:
		return new(UpdateDrain)
	case KindDeregisterNode:
		return new(DeregisterNode)
	case KindRegisterJob:
		return new(RegisterJob)
	case KindDeregisterJob:
		return new(DeregisterJob)
	case KindUpdateEvals:
		return new(UpdateEvals)
	case KindApplyPlans, KindApplyPlansShort:
		return new(ApplyPlans)
	case KindUpdateAllocs, KindUpdateAllocsShort:
		return new(UpdateAllocs)
	case KindUpdateTransitions:
		return new(UpdateTransitions)
	case KindUpdateDeployment:
		return new(UpdateDeployment)
	case KindSetJobStability:
		return new(SetJobStability)
	case KindCreateModelVersion:
		return new(CreateModelVersion)
	case KindSetAlias:
		return new(SetAlias)
	case KindSetSchedulerConfig:
		return new(SetSchedulerConfig)
	case KindReap:
		return new(Reap)
	case KindBootstrapACL:
		return new(BootstrapACL)
	case KindUpsertACLPolicies:
		return new(UpsertACLPolicies)
	case KindDeleteACLPolicies:
		return new(DeleteACLPolicies)
	case KindUpsertACLTokens:
		return new(UpsertACLTokens)
	case KindDeleteACLTokens:
		return new(DeleteACLTokens)
	case KindCreateIntroToken:
		return new(CreateIntroToken)
	case KindUseIntroToken:
		return new(UseIntroToken)
	case KindDeleteIntroTokens:
		return new(DeleteIntroTokens)
	case KindRegisterServer:
		return new(RegisterServer)
	case KindRemoveServer:
		return new(RemoveServer)
	case KindSetAutopilotConfig:
		return new(SetAutopilotConfig)
	case KindSetClusterMeta:
		return new(SetClusterMeta)
	case KindSetFleetHold:
		return new(SetFleetHold)
	case KindDispatchJob:
		return new(DispatchJob)
	case KindLaunchJob:
		return new(LaunchJob)
	case KindUpsertNamespaces:
		return new(UpsertNamespaces)
	case KindDeleteNamespaces:
		return new(DeleteNamespaces)
	case KindUpsertQuotas:
		return new(UpsertQuotas)
	case KindDeleteQuotas:
		return new(DeleteQuotas)
	case KindTagVersion:
		return new(TagVersion)
	case KindScaleJob:
		return new(ScaleJob)
	case KindPromoteDeployment:
		return new(PromoteDeployment)
	case KindOrderDevice:
		return new(OrderDevice)
	}
	return nil
}

// EncodeCommand makes a log entry, of the newest rules: the kind's byte, then the body as Marshal writes it, or in the
// short form. It packs the allocations of a command.
func EncodeCommand(c Command) []byte { return encodeCommand(c, CurrentRules) }

// EncodeCommand makes a log entry for the servers that the region has, of the newest rules that all of them know,
// or of those that the command cannot do without: see Supports.
func (s *Snapshot) EncodeCommand(c Command) []byte { return encodeCommand(c, s.Rules()) }

func encodeCommand(c Command, rules uint64) []byte {
	stamp := c.stamp()
	stamp.Rules = max(rules, needs(c))
	if stamp.Rules >= rulesScaling {
		switch c := c.(type) {
		case *ApplyPlans:
			c.pack()
			return scratched(func(b []byte) []byte { return storeApplyPlans(append(b, byte(KindApplyPlansShort)), c) })
		case *UpdateAllocs:
			c.pack()
			return scratched(func(b []byte) []byte { return storeUpdateAllocs(append(b, byte(KindUpdateAllocsShort)), c) })
		}
	}
	return marshal([]byte{byte(c.kind())}, c)
}

// EntrySize is how many bytes of an entry by EncodeCommand a *Plan takes, or an *Allocation that its node reports. It packs
// allocations, too.
func (s *Snapshot) EntrySize(part any) int {
	short := s.Rules() >= rulesScaling
	buf := scratch.Get().(*[]byte)
	defer scratch.Put(buf)
	b := (*buf)[:0]
	switch v := part.(type) {
	case *Plan:
		if v.pack(); short {
			b = storePlan(b, v)
		}
	case *Allocation:
		if v.packReport(); short {
			b = storeAllocation(b, v)
		}
	default:
		panic(fmt.Sprintf("%T is no part of a command", part)) // a bug
	}
	if !short {
		b, _ = appendRecord(b, part)
	}
	*buf = b
	return len(b)
}

// pack packs what a plan places. An entry with it is half as long, and nobody has to pack it while applying.
func (p *Plan) pack() {
	for _, a := range p.Place {
		a.pack()
	}
}

func (c *ApplyPlans) pack() {
	for _, p := range c.Plans {
		p.pack()
	}
}

func (c *UpdateAllocs) pack() {
	for _, a := range c.Allocs {
		a.packReport()
	}
}

// packReport packs what a node says of an allocation, as much of it as the state keeps.
func (a *Allocation) packReport() {
	a.TaskStates = trimTaskStates(a.TaskStates)
	a.pack()
}

// needs gives the rules without which a command means nothing, or something else; 0: any will do.
func needs(c Command) uint64 {
	switch c := c.(type) {
	case *DispatchJob, *LaunchJob:
		return rulesChildren
	case *UpsertNamespaces, *DeleteNamespaces, *UpsertQuotas, *DeleteQuotas, *TagVersion, *PromoteDeployment, *ScaleJob, *OrderDevice:
		return rulesEngine
	case *UpdateDrain:
		if c.Strategy != nil && c.Strategy.Interrupted {
			return rulesEngine
		}
	case *UpdateDeployment:
		if len(c.Healthy)+len(c.Unhealthy) > 0 {
			return rulesEngine
		}
	case *RegisterJob:
		if c.Job != nil {
			return c.Job.NeedsRules()
		}
	case *ApplyPlans:
		if slices.ContainsFunc(c.Plans, (*Plan).needsEngine) {
			return rulesEngine
		}
	case *SetSchedulerConfig:
		if c.Config != nil && c.Config.PreemptionConfig != (PreemptionConfig{}) {
			return rulesEngine
		}
	}
	return 0
}

// DecodeCommand reads a log entry.
func DecodeCommand(entry []byte) (Command, error) { return decodeCommand(entry, nil) }

func decodeCommand(entry []byte, shared *interner) (Command, error) {
	if len(entry) == 0 {
		return nil, fmt.Errorf("log entry is empty")
	}
	c := newCommand(Kind(entry[0]))
	if c == nil {
		return nil, fmt.Errorf("log entry of kind %d: this version of rxvision does not know it; run the version that wrote it, or a newer one", entry[0])
	}
	d := decoder{left: entry[1:], shared: shared, short: c.kind() != Kind(entry[0])}
	if err := d.record(c); err != nil {
		return nil, err
	}
	if rules := c.stamp().Rules; rules > CurrentRules {
		return nil, fmt.Errorf("log entry by version %d of the rules: this version of rxvision knows them up to %d; run the version that wrote it, or a newer one", rules, CurrentRules)
	}
	return c, nil
}

// Result is what applying a command gave. It is kept by request ID (the last
// MaxResults), so that a retried command gets the first answer.
type Result struct {
	Index          uint64
	Err            *Error // the command was refused and changed nothing
	EvalID         string
	JobModifyIndex uint64
	JobID          string `json:",omitempty"` // of the child that was dispatched or launched; "": none was
	Version        uint64 // of the model or job that was created
	Plans          []PlanResult
	Updated        bool    // SetSchedulerConfig: whether the check passed
	Reverted       *uint64 `json:",omitempty"` // UpdateDeployment: the stable version that the job was taken back to; nil: none
}

// PlanResult is the fate of one plan of ApplyPlans.
type PlanResult struct {
	EvalID  string
	Stale   bool     // the evaluation had been answered already: nothing was done
	Refused []string // node IDs on which the plan did not fit
}

// MaxResults bounds the results that are kept for retries.
const MaxResults = 100_000
