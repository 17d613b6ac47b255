package cluster

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// ScalingHorizontal is the type of policies that change a group's count, the only one.
const ScalingHorizontal = "horizontal"

// ScalingPolicy says within which bounds the count of a group may be changed, and by what rule an autoscaler may do so
// (Nomad: scaling block, https://developer.hashicorp.com/nomad/docs/job-specification/scaling).
type ScalingPolicy struct {
	Type    string
	Min     int64
	Max     int64
	Enabled bool
	Policy  json.RawMessage `json:",omitempty"` // an object for the autoscaler, as it was given

	// What of it is for the servers' own autoscaler, as jobspec reads it; nothing when it is for another one.
	Checks   []*ScalingCheck `json:",omitempty"`
	Cooldown time.Duration   `json:",omitempty"` // after a change of the count, before the next one
	// CooldownUp takes its place after a change to more, 0: it does not.
	CooldownUp time.Duration `json:",omitempty"`
	Window     time.Duration `json:",omitempty"` // in which a lower count must have sufficed all the time
}

// ScalingCheck gives a count: as many allocations as bring a metric to its target, or, while a schedule runs, a fixed one.
type ScalingCheck struct {
	Name      string
	Query     string        `json:",omitempty"` // one of ScalingQueries; "" for a schedule
	Window    time.Duration `json:",omitempty"` // over which the metric is averaged
	Target    int64         `json:",omitempty"` // thousandths: of the metric, for each allocation
	Tolerance int64         `json:",omitempty"` // thousandths of the target by which the metric may be off
	MaxUp     int           `json:",omitempty"` // at most so many more at a time; 0: any
	MaxDown   int           `json:",omitempty"`
	Count     int           `json:",omitempty"` // of a schedule: at least so many while it runs
	Start     string        `json:",omitempty"` // … cron expression of its beginnings
	TimeZone  string        `json:",omitempty"`
	Duration  time.Duration `json:",omitempty"`
}

// Metrics by which groups may be scaled: of an allocation, but for MetricHeld.
const (
	MetricCPU       = "cpu"        // percent of the processor that it asks for
	MetricMemory    = "memory"     // percent of the memory that it asks for
	MetricGPU       = "gpu"        // percent: how busy its GPUs are
	MetricGPUMemory = "gpu-memory" // percent of their memory
	MetricInFlight  = "in_flight"  // requests that gateways have it work on
	MetricQueueTime = "queue_time" // milliseconds that a request waits there for its turn

	// MetricHeld are requests that gateways hold for a model until there is a replica.
	MetricHeld = "held"
)

// ScalingQueries are the metrics that a check may name.
var ScalingQueries = []string{MetricCPU, MetricMemory, MetricGPU, MetricGPUMemory, MetricInFlight, MetricQueueTime, MetricHeld}

// ScalingStatus is how a leader's autoscaler found a policy when it last looked. It is no part of the state.
type ScalingStatus struct {
	State  string // one of the states below
	Reason string // in one sentence
	Check  string `json:",omitempty"` // that decided
	Count  int    // that the group is to have
}

// States of a scaling policy.
const (
	ScalingSteady   = "steady"
	ScalingChanged  = "changed"        // the count was changed just now
	ScalingHeld     = "held"           // a change waits: for a cooldown, a window, a deployment, allocations that start
	ScalingMissing  = "missing-metric" // at least one check has no metric; nothing is scaled down
	ScalingDisabled = "disabled"
	ScalingUnknown  = "unknown" // the leader has not looked at it yet, or does not answer
)

// scales says whether the servers' autoscaler has something to do for the job.
func (j *Job) scales() bool {
	return slices.ContainsFunc(j.TaskGroups, func(g *TaskGroup) bool { return g != nil && g.Scaling != nil && len(g.Scaling.Checks) > 0 })
}

// ScaledJobs are the jobs that the servers' autoscaler looks after: those that run and have a group with checks.
func (s *Snapshot) ScaledJobs(ws WatchSet) []*Job {
	return list[Job](s.txn, ws, TableJobs, "scaled_prefix")
}

// ScalingPolicyID names the policy of a group: the same as long as the group has its name.
func ScalingPolicyID(k JobKey, group string) string {
	sum := sha256.Sum256([]byte(k.Namespace + sep + k.ID + sep + group))
	return fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
}

// Bounds of what is kept of the scaling of a group.
const (
	MaxScalingEvents  = 20 // of a group; the oldest leave first
	MaxScalingMessage = 1024
	MaxScalingMeta    = 4096
)

// JobScaling is what is remembered of the scaling of a job.
type JobScaling struct {
	Namespace   string
	JobID       string
	Groups      map[string]*GroupScaling
	ModifyIndex uint64
}

// GroupScaling is one group's part of it, newest first.
type GroupScaling struct{ Events []*ScalingEvent }

// ScalingEvent is one change of a group's count, or what an autoscaler has to say of one that it did not make.
type ScalingEvent struct {
	Time          int64 // unix nanoseconds
	Count         *int64
	PreviousCount int64
	Error         bool
	Message       string
	Meta          json.RawMessage `json:",omitempty"` // an object
	EvalID        string
	CreateIndex   uint64
}

// Scaling returns what is remembered of the scaling of a job, nil for nothing.
func (s *Snapshot) Scaling(ws WatchSet, k JobKey) *JobScaling {
	return first[JobScaling](s.txn, ws, TableScalingEvents, "id", k.Namespace, k.ID)
}

// scaleJob changes the count of a group within the bounds of its policy, and remembers that.
func (t *tx) scaleJob(c *ScaleJob) (Result, *Error) {
	k := JobKey{c.Namespace, c.JobID}
	old := t.Job(nil, k)
	if old == nil {
		return Result{}, Errorf(CodeNotFound, "job %q not found", c.JobID)
	}
	g := old.Group(c.Group)
	if g == nil {
		return Result{}, Errorf(CodeInvalid, "task group %q specified for scaling does not exist in job", c.Group)
	}
	if old.PerNode() && c.Count != nil {
		return Result{}, Errorf(CodeInvalid, "a job of type %s cannot be scaled: it runs on every node that may run it", old.Type)
	}
	if len(c.Message) > MaxScalingMessage || len(c.Meta) > MaxScalingMeta {
		return Result{}, Errorf(CodeInvalid, "the message of a scaling event may have %d bytes, its meta %d", MaxScalingMessage, MaxScalingMeta)
	}
	event := &ScalingEvent{
		Time: t.stamp.Time, Count: c.Count, PreviousCount: int64(g.Count), Error: c.Error, Message: c.Message, Meta: c.Meta, CreateIndex: t.index,
	}
	res := Result{JobModifyIndex: old.JobModifyIndex, Version: old.Version}
	if c.Count != nil {
		if refused := t.checkScaling(c, old, g); refused != nil {
			return Result{}, refused
		}
		j := Clone(old)
		j.Group(c.Group).Count = int(*c.Count)
		j = t.putJob(j, old)
		res.JobModifyIndex, res.Version = j.JobModifyIndex, j.Version
		if c.EvalID != "" && !j.Spawns() {
			t.evalJob(j, TriggerScaling, c.EvalID, 0)
			res.EvalID, event.EvalID = c.EvalID, c.EvalID
		}
	}
	n := &JobScaling{Namespace: k.Namespace, JobID: k.ID, Groups: map[string]*GroupScaling{}}
	if was := t.Scaling(nil, k); was != nil {
		n = Clone(was)
	}
	events := []*ScalingEvent{event}
	if was := n.Groups[c.Group]; was != nil {
		events = append(events, was.Events[:min(len(was.Events), MaxScalingEvents-1)]...)
	}
	for name := range n.Groups { // order does not matter
		if old.Group(name) == nil {
			delete(n.Groups, name)
		}
	}
	n.Groups[c.Group], n.ModifyIndex = &GroupScaling{events}, t.index
	t.put(TableScalingEvents, n)
	return res, nil
}

// checkScaling says why the count of a job's group cannot be changed now.
func (t *tx) checkScaling(c *ScaleJob, j *Job, g *TaskGroup) *Error {
	policy := g.Scaling
	switch d := t.LatestDeployment(nil, j.Key()); {
	case c.Error:
		return Errorf(CodeInvalid, "a scaling event that is an error cannot set the count")
	case *c.Count < 0:
		return Errorf(CodeInvalid, "scaling action count can't be negative")
	case t.SchedulerConfig(nil).RejectJobRegistration:
		return errRejecting
	case j.Type != JobTypeService && j.Type != JobTypeBatch:
		return Errorf(CodeInvalid, "a job of type %s cannot be scaled", j.Type)
	case j.Stop:
		return Errorf(CodeInvalid, "job %q is stopped", j.ID)
	case policy != nil && *c.Count < policy.Min:
		return Errorf(CodeInvalid, "group count was less than scaling policy minimum: %d < %d", *c.Count, policy.Min)
	case policy != nil && *c.Count > policy.Max:
		return Errorf(CodeInvalid, "group count was greater than scaling policy maximum: %d > %d", *c.Count, policy.Max)
	case d != nil && d.Active() && d.JobCreateIndex == j.CreateIndex:
		return Errorf(CodeInvalid, "job scaling blocked due to active deployment")
	case c.JobModifyIndex != 0 && c.JobModifyIndex != j.JobModifyIndex:
		return Errorf(CodeConflict, "Enforcing job modify index %d: job exists with conflicting job modify index: %d", c.JobModifyIndex, j.JobModifyIndex)
	}
	return nil
}
