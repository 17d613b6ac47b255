package cluster

import (
	"strconv"
	"strings"
	"time"
)

// MaxGang bounds the members of a gang: their placements go into one log entry.
const MaxGang = 384

// Gang says that the allocations of a group run together or not at all (group meta
// rx_gang, rx_topology, rx_topology_required).
type Gang struct {
	// Topology names attributes of nodes, such as ${meta.rack}, the narrowest first: all
	// members are to be on nodes with one value of the first of them for which that is possible.
	Topology []string
	Required bool // they must be, for the last of them at least; else it is a preference
}

// Default and bound of the time between the notice to a preempted allocation and its end.
const (
	DefaultPreemptGrace = 30 * time.Second
	MaxPreemptGrace     = time.Hour
)

// PreemptPolicy is what a group says of its allocations' preemption (group meta
// rx_preemptible, rx_movable, rx_min_runtime, rx_preempt_grace, rx_preempt_signal).
type PreemptPolicy struct {
	Never      bool          `json:",omitempty"` // nothing preempts it
	Reclaim    bool          `json:",omitempty"` // what it borrows may be taken back by work of the same priority
	Move       bool          `json:",omitempty"` // it may be moved to another node to make room there for work of the same priority
	MinRuntime time.Duration `json:",omitempty"` // from its start; it is not preempted sooner
	Grace      time.Duration `json:",omitempty"` // from the notice to the kill signal; 0: DefaultPreemptGrace
	Signal     string        `json:",omitempty"` // of the notice; "": SIGTERM
}

// PreemptGrace is how long the group's allocations have from the notice of their preemption.
func (g *TaskGroup) PreemptGrace() time.Duration {
	if g.Preempt == nil || g.Preempt.Grace <= 0 {
		return DefaultPreemptGrace
	}
	return min(g.Preempt.Grace, MaxPreemptGrace)
}

// Claim is a place that an allocation to be will take once others have left it. While the
// evaluation that has it is open, work of the same or a lower priority keeps off.
type Claim struct {
	AllocID    string // of the allocation to be
	Name       string // JOB.GROUP[INDEX]
	TaskGroup  string
	JobVersion uint64
	NodeID     string
	Resources  *AllocatedResources
	Awaits     []string // IDs of allocations on the node that hold parts of it still
	Preempts   []string // those that were preempted for it, wherever they ran
}

// MaxCheckpoints, MaxCheckpointPath bound what an allocation tells of its checkpoints.
const (
	MaxCheckpoints    = 64 // tasks
	MaxCheckpointPath = 1024
)

// Checkpoint is how far a task has come, as it says itself: what it can go on from.
type Checkpoint struct {
	Step int64
	Time Time
	Path string // as the task named it, at most MaxCheckpointPath bytes
}

// IndexOf reads INDEX of an allocation's name JOB.GROUP[INDEX], -1 when there is none. In a
// gang it is the member's rank.
func IndexOf(name string) int {
	open := strings.LastIndexByte(name, '[')
	if open < 0 || !strings.HasSuffix(name, "]") {
		return -1
	}
	i, err := strconv.Atoi(name[open+1 : len(name)-1])
	if err != nil {
		return -1
	}
	return i
}

// needsEngine says whether a plan does what servers before rulesEngine would do otherwise.
func (p *Plan) needsEngine() bool {
	if len(p.Gangs) > 0 || p.preempts() {
		return true
	}
	for _, e := range p.Evals {
		if len(e.Claims) > 0 {
			return true
		}
	}
	return false
}

// preempts says whether the plan evicts allocations of other jobs.
func (p *Plan) preempts() bool {
	for _, s := range p.Stop {
		if s.PreemptedBy != "" {
			return true
		}
	}
	return false
}

// overtaken says whether something that the plan preempts has ended, was asked to, or is of
// another version since the plan was made: then the plan did not know what it costs, or that it makes room anyway.
func (t *tx) overtaken(p *Plan) bool {
	var seen uint64 // by who made the plan
	for _, e := range p.Evals {
		if e.ID == p.EvalID {
			seen = e.SnapshotIndex
		}
	}
	for _, s := range p.Stop {
		if s.PreemptedBy == "" {
			continue
		}
		if a := t.Alloc(nil, s.AllocID); a == nil || a.Terminal() || seen != 0 && a.AllocModifyIndex > seen {
			return true
		}
	}
	return false
}

// refuseGangs refuses all nodes of a gang of which one is refused: a gang is placed whole. It
// looks again until that refuses no more, for a node may hold members of several gangs.
func refuseGangs(p *Plan, refused map[string]bool) (more []string) {
	for again := len(p.Gangs) > 0 && len(refused) > 0; again; {
		again = false
		for _, group := range p.Gangs {
			broken := false
			for _, a := range p.Place {
				broken = broken || a.TaskGroup == group && refused[a.NodeID]
			}
			if !broken {
				continue
			}
			for _, a := range p.Place {
				if a.TaskGroup == group && !refused[a.NodeID] {
					refused[a.NodeID], again = true, true
					more = append(more, a.NodeID)
				}
			}
		}
	}
	return more
}

// evalPreempted asks for an evaluation of each job of which the plan has preempted something.
func (t *tx) evalPreempted(p *Plan) {
	var jobs []JobKey
	for _, s := range p.Stop {
		if s.PreemptedBy != "" {
			if a := t.Alloc(nil, s.AllocID); a != nil {
				jobs = append(jobs, a.JobKey())
			}
		}
	}
	t.evalJobs(jobs, TriggerPreemption, nil)
}

// Claims returns the open evaluations that have claims.
func (s *Snapshot) Claims() []*Evaluation {
	return list[Evaluation](s.txn, nil, TableEvals, "claims_prefix", "")
}
