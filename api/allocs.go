package api

import (
	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
)

// allocStub is an allocation in a list.
type allocStub struct {
	ID                    string
	EvalID                string
	Name                  string
	Namespace             string
	NodeID                string
	NodeName              string
	JobID                 string
	JobType               string
	JobVersion            uint64
	TaskGroup             string
	AllocatedResources    *cluster.AllocatedResources `json:",omitempty"`
	DesiredStatus         string
	DesiredDescription    string
	DesiredTransition     cluster.DesiredTransition
	ClientStatus          string
	ClientDescription     string
	TaskStates            map[string]*cluster.TaskState
	DeploymentStatus      *cluster.AllocDeploymentStatus
	FollowupEvalID        string
	PreviousAllocation    string
	NextAllocation        string
	RescheduleTracker     *cluster.RescheduleTracker
	PreemptedAllocations  []string
	PreemptedByAllocation string
	CreateIndex           uint64
	ModifyIndex           uint64
	CreateTime            int64
	ModifyTime            int64
}

// allocFields are the parts of a stub that a client asks for.
type allocFields struct{ states, resources bool }

func stubOfAlloc(snap *cluster.Snapshot, a *cluster.Allocation, f allocFields) *allocStub {
	stub := &allocStub{
		ID: a.ID, EvalID: a.EvalID, Name: a.Name, Namespace: a.Namespace, NodeID: a.NodeID, NodeName: a.NodeName,
		JobID: a.JobID, JobType: jobOf(snap, a).Type, JobVersion: a.JobVersion, TaskGroup: a.TaskGroup,
		DesiredStatus: a.DesiredStatus, DesiredDescription: a.DesiredDescription, DesiredTransition: a.DesiredTransition,
		ClientStatus: a.ClientStatus, ClientDescription: a.ClientDescription, DeploymentStatus: a.DeploymentStatus,
		FollowupEvalID: a.FollowupEvalID, PreviousAllocation: a.PreviousAllocation, NextAllocation: a.NextAllocation,
		RescheduleTracker: a.RescheduleTracker, PreemptedAllocations: a.PreemptedAllocations,
		PreemptedByAllocation: a.PreemptedByAllocation,
		CreateIndex:           a.CreateIndex, ModifyIndex: a.ModifyIndex, CreateTime: a.CreateTime, ModifyTime: a.ModifyTime,
	}
	if f.states {
		stub.TaskStates = a.Whole().TaskStates
	}
	if f.resources {
		stub.AllocatedResources = a.AllocatedResources
	}
	return stub
}

// jobOf gives the version of the job that an allocation runs. The state may have
// forgotten it once the allocation has ended; then what the allocation itself
// tells of it stands in, since clients cannot show one without its job.
func jobOf(snap *cluster.Snapshot, a *cluster.Allocation) *cluster.Job {
	if j := snap.JobVersion(nil, a.JobKey(), a.JobVersion); j != nil && j.Group(a.TaskGroup) != nil {
		return j
	}
	j := &cluster.Job{
		ID: a.JobID, Name: a.JobID, Namespace: a.Namespace, Version: a.JobVersion, CreateIndex: a.JobCreateIndex,
		Type: cluster.JobTypeService, Priority: cluster.DefaultPriority, Status: cluster.JobStatusDead,
		StatusDescription: "this version of the job is no longer kept",
		NodePool:          cluster.DefaultNodePool,
	}
	if now := snap.Job(nil, a.JobKey()); now != nil && now.CreateIndex == a.JobCreateIndex {
		j.Name, j.Type, j.Priority, j.Status = now.Name, now.Type, now.Priority, now.Status
	}
	g := &cluster.TaskGroup{Name: a.TaskGroup, Count: 1}
	if a.AllocatedResources != nil {
		for _, name := range sortedKeys(a.AllocatedResources.Tasks) {
			g.Tasks = append(g.Tasks, &cluster.Task{Name: name})
		}
	}
	j.TaskGroups = []*cluster.TaskGroup{g}
	return j
}

// allocation is an allocation with its job and the older forms of its resources,
// which clients still read.
type allocation struct {
	*cluster.Allocation
	Job             *cluster.Job
	Metrics         *allocMetric
	Resources       legacyResources
	SharedResources legacyResources
	TaskResources   map[string]legacyResources
	NetworkStatus   networkStatus
}

// legacyResources is CPU in MHz, memory and disk in MiB.
type legacyResources struct {
	CPU, Cores, MemoryMB, MemoryMaxMB, DiskMB, IOPS int64
	Networks                                        []*cluster.NetworkResource
	Devices                                         []*cluster.RequestedDevice
}

// networkStatus is of network modes that this version has not; tasks use the host's.
type networkStatus struct {
	InterfaceName, Address, AddressIPv6 string
	DNS                                 *struct{}
}

func showAlloc(snap *cluster.Snapshot, a *cluster.Allocation) *allocation {
	a = a.Whole()
	out := &allocation{
		Allocation: a, Job: jobOf(snap, a), Metrics: showMetric(a.Metrics), TaskResources: map[string]legacyResources{},
	}
	if a.AllocatedResources == nil {
		return out
	}
	shared := a.AllocatedResources.Shared
	out.SharedResources = legacyResources{DiskMB: shared.DiskMB, Networks: shared.Networks}
	out.Resources = out.SharedResources
	for name, t := range a.AllocatedResources.Tasks {
		out.TaskResources[name] = legacyResources{
			CPU: t.Cpu.CpuShares, MemoryMB: t.Memory.MemoryMB, MemoryMaxMB: t.Memory.MemoryMaxMB,
		}
		out.Resources.CPU += t.Cpu.CpuShares
		out.Resources.MemoryMB += t.Memory.MemoryMB
		out.Resources.MemoryMaxMB += max(t.Memory.MemoryMB, t.Memory.MemoryMaxMB)
	}
	return out
}

func allocPage(r *request, snap *cluster.Snapshot, ws cluster.WatchSet, allocs []*cluster.Allocation, f allocFields) found {
	at := func(a *cluster.Allocation) position { return created(a.CreateIndex, a.ID) }
	stub := func(a *cluster.Allocation) any { return stubOfAlloc(snap, a, f) }
	allocs = seen(r, acl.ReadJob, allocs, allocNamespace)
	return page(r, snap.Index(ws, cluster.TableAllocs), allocs, false, at, stub, stub)
}

func allocNamespace(a *cluster.Allocation) string { return a.Namespace }

func (s *Server) listAllocs(r *request) (any, error) {
	prefix, err := r.idPrefix("alloc")
	if err != nil {
		return nil, err
	}
	f := allocFields{states: true}
	if f.resources, err = r.flag("resources", true); err != nil {
		return nil, err
	}
	if r.query.Has("task_states") {
		if f.states, err = r.flag("task_states", true); err != nil {
			return nil, err
		}
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		allocs := inNamespace(r, snap.Allocs(ws, prefix), allocNamespace)
		return allocPage(r, snap, ws, allocs, f)
	})
}

func (s *Server) readAlloc(r *request) (any, error) {
	id, err := wholeUUID(r.params["id"], "alloc")
	if err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		a := snap.Alloc(ws, id)
		if a == nil {
			return missing(snap, ws, cluster.TableAllocs, "alloc not found")
		}
		if err := r.allow(a.Namespace, ""); err != nil {
			return found{index: a.ModifyIndex, err: err}
		}
		return found{body: showAlloc(snap, a), index: a.ModifyIndex}
	})
}

// allocStopped is the answer to `nomad alloc stop`.
type allocStopped struct {
	EvalID string
	Index  uint64
}

func (s *Server) stopAlloc(r *request) (any, error) {
	id, err := wholeUUID(r.params["id"], "alloc")
	if err != nil {
		return nil, err
	}
	noDelay, err := r.flag("no_shutdown_delay", true)
	if err != nil {
		return nil, err
	}
	if _, err := r.flag("reschedule", true); err != nil { // a stopped allocation is placed anew in any case
		return nil, err
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	snap := s.cfg.Store.State().Snapshot()
	a := snap.Alloc(nil, id)
	if a == nil {
		return nil, notFound("alloc not found")
	}
	if err := r.allow(a.Namespace, ""); err != nil {
		return nil, err
	}
	yes := true
	transition := cluster.DesiredTransition{Migrate: &yes}
	if noDelay {
		transition.NoShutdownDelay = &yes
	}
	eval := newEval(jobOf(snap, a), cluster.TriggerAllocStop)
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.UpdateTransitions{
		Transitions: map[string]cluster.DesiredTransition{id: transition}, Evals: []*cluster.Evaluation{eval},
	})
	if err != nil {
		return nil, refused(err)
	}
	return &answer{body: &allocStopped{EvalID: eval.ID, Index: res.Index}, index: res.Index}, nil
}
