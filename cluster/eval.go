package cluster

import "time"

// Evaluation statuses and triggers as Nomad's API names them.
const (
	EvalStatusBlocked  = "blocked"
	EvalStatusPending  = "pending"
	EvalStatusComplete = "complete"
	EvalStatusFailed   = "failed"
	EvalStatusCanceled = "canceled"

	TriggerJobRegister       = "job-register"
	TriggerJobDeregister     = "job-deregister"
	TriggerPeriodicJob       = "periodic-job"
	TriggerNodeUpdate        = "node-update"
	TriggerNodeDrain         = "node-drain"
	TriggerAllocStop         = "alloc-stop"
	TriggerAllocFailure      = "alloc-failure"
	TriggerAllocReschedule   = "alloc-reschedule"
	TriggerQueuedAllocs      = "queued-allocs"
	TriggerDeploymentWatcher = "deployment-watcher"
	TriggerMaxPlans          = "max-plan-attempts"
	TriggerFailedFollowUp    = "failed-follow-up"
	TriggerRollingUpdate     = "rolling-update"
	TriggerReconnect         = "reconnect"
	TriggerMaxDisconnect     = "max-disconnect-timeout"
	TriggerPreemption        = "preemption"
	TriggerScaling           = "job-scaling"
)

// Evaluation asks the scheduler to bring a job's allocations to what the job
// says, and keeps the answer.
type Evaluation struct {
	ID                string
	Namespace         string
	Priority          int
	Type              string
	TriggeredBy       string
	JobID             string
	JobModifyIndex    uint64
	NodeID            string
	NodeModifyIndex   uint64
	DeploymentID      string
	Status            string
	StatusDescription string
	Wait              time.Duration
	WaitUntil         Time
	NextEval          string
	PreviousEval      string
	BlockedEval       string
	FailedTGAllocs    map[string]*AllocMetric
	PlanAnnotations   *PlanAnnotations
	QueuedAllocations map[string]int
	SnapshotIndex     uint64
	Claims            []*Claim `json:",omitempty"` // of a blocked one: the places that it waits for
	CreateIndex       uint64
	ModifyIndex       uint64
	CreateTime        int64
	ModifyTime        int64
	QuotaLimitReached string `json:",omitempty"` // the quota that keeps something of it waiting
}

// JobKey is the key of the evaluation's job.
func (e *Evaluation) JobKey() JobKey { return JobKey{e.Namespace, e.JobID} }

// Terminal says whether the evaluation has been answered for good.
func (e *Evaluation) Terminal() bool {
	switch e.Status {
	case EvalStatusComplete, EvalStatusFailed, EvalStatusCanceled:
		return true
	}
	return false
}

// PlanAnnotations counts, per group, what a plan would do.
type PlanAnnotations struct {
	DesiredTGUpdates map[string]*DesiredUpdates
	PreemptedAllocs  []*PreemptedAlloc `json:",omitempty"` // what the plan would preempt
}

// PreemptedAlloc names an allocation that a plan would preempt, in the words of an
// allocation's list entry.
type PreemptedAlloc struct {
	ID, Namespace, JobID, JobType, TaskGroup string
}

// DesiredUpdates counts a group's changes.
type DesiredUpdates struct {
	Ignore, Place, Migrate, Stop, InPlaceUpdate, DestructiveUpdate, Canary, Preemptions uint64
}

// Plan is what the scheduler proposes for one evaluation. The state checks it
// again when it is applied: nodes on which it does not fit are refused whole, the
// rest is committed.
type Plan struct {
	EvalID         string
	EvalEpoch      uint64 // ModifyIndex of the evaluation that the plan answers
	Namespace      string
	JobID          string
	JobVersion     uint64
	JobModifyIndex uint64
	AllAtOnce      bool // refuse all if one node refuses
	// Place holds new allocations, and existing ones updated in place.
	Place []*Allocation
	// Stop asks allocations to stop.
	Stop []*AllocStop
	// Deployment is created together with the placements, nil for none.
	Deployment *Deployment
	// DeploymentUpdates changes other deployments' status (the older one is cancelled).
	DeploymentUpdates []*DeploymentStatusUpdate
	// Evals updates the plan's evaluation and creates follow-ups and blocked ones.
	Evals []*Evaluation
	// Answers names other pending evaluations of the job, as they were in the snapshot that
	// the plan was made on (SnapshotIndex of the plan's evaluation): it answers them as well.
	// At most MaxAnswered.
	Answers []string
	// Gangs names groups of which all placements are refused if one is.
	Gangs []string `json:",omitempty"`
}

// AllocStop is the stop of one allocation within a plan.
type AllocStop struct {
	AllocID            string
	DesiredStatus      string // stop or evict; empty leaves it: only ClientStatus or FollowupEvalID changes
	DesiredDescription string
	ClientStatus       string // lost or unknown when the node is gone, else empty
	FollowupEvalID     string
	Keeps              string // ID of the allocation of this name that goes on: it counts as replaced no more
	PreemptedBy        string `json:",omitempty"` // ID of the allocation to be that it makes room for; DesiredStatus is evict
}

// DeploymentStatusUpdate sets a deployment's status.
type DeploymentStatusUpdate struct {
	DeploymentID      string
	Status            string
	StatusDescription string
}
