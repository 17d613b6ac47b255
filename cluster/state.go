package cluster

import (
	"slices"
	"strings"

	"github.com/hashicorp/go-memdb"
)

// WatchSet collects what a read depended on; Watch on it returns when any of it
// changed. A nil WatchSet collects nothing.
type WatchSet = memdb.WatchSet

// Table names; an index per table is what blocking queries wait for.
const (
	TableIndex         = "index"
	TableNodes         = "nodes"
	TableJobs          = "jobs"
	TableJobVersions   = "job_versions"
	TableSubmissions   = "job_submissions"
	TableSummaries     = "job_summaries"
	TableEvals         = "evals"
	TableAllocs        = "allocs"
	TableDeployments   = "deployments"
	TableModels        = "models"
	TableModelVersions = "model_versions"
	TableScheduler     = "scheduler_config"
	TableResults       = "results"
	TableFleetHold     = "fleet_hold"
	TableServers       = "servers"
	TableAutopilot     = "autopilot_config"
	TableClusterMeta   = "cluster_meta"

	TablePeriodicLaunches = "periodic_launches"
	TableScalingEvents    = "scaling_events"
)

// IndexCapacity is an entry of the index table that is no table: the last log
// index at which room for work may have appeared: an allocation ended, a node came or
// changed, a limit was raised, or what was kept for others is no longer. Snapshot.Index and its watch take it like a table.
const IndexCapacity = "capacity"

// Table describes one table of the state: its name, the type byte of its records
// in a snapshot stream (Nomad's numbers where Nomad has the table) and how to
// make an empty record.
type Table struct {
	Name   string
	Record byte
	New    func() any
	key    func(any) string
	by     map[string]func(any) string // secondary indexes: value by record, "" for none
	pack   func(*interner, any)        // makes a record small before it is kept; nil: it stays as it is
	rests  func(any) (int64, bool)     // whether a record is kept at rest, and since when; nil: none is

	number  int // in allTables
	indexes []secondary
}

// secondary is a secondary index of a table.
type secondary struct {
	name string
	of   func(any) string
}

// IndexEntry is the last log index that changed a table.
type IndexEntry struct {
	Table string
	Index uint64
}

const sep = "\x00"

// seq writes a number so that text sorts as numbers do.
func seq(n uint64) string {
	var b [20]byte
	for i := len(b) - 1; i >= 0; i-- {
		b[i] = '0' + byte(n%10)
		n /= 10
	}
	return string(b[:])
}

// Tables lists all tables in the order in which a snapshot holds them.
var Tables = []*Table{
	{
		Name: TableIndex, Record: 2, New: func() any { return new(IndexEntry) },
		key: func(v any) string { return v.(*IndexEntry).Table },
	},
	{
		Name: TableNodes, Record: 0, New: func() any { return new(Node) },
		key: func(v any) string { return v.(*Node).ID },
	},
	{
		Name: TableJobs, Record: 1, New: func() any { return new(Job) },
		key: func(v any) string { j := v.(*Job); return j.Namespace + sep + j.ID },
		by: map[string]func(any) string{
			"launches": func(v any) string {
				if j := v.(*Job); j.Launches() {
					return j.Namespace + sep + j.ID
				}
				return ""
			},
			"pernode": func(v any) string {
				if j := v.(*Job); j.PerNode() && !j.Stop && !j.Spawns() {
					return j.Namespace + sep + j.ID
				}
				return ""
			},
			"limited": func(v any) string {
				if j := v.(*Job); j.RunLimited() && !j.Stop {
					return j.Namespace + sep + j.ID
				}
				return ""
			},
			"scaled": func(v any) string {
				if j := v.(*Job); j.scales() && !j.Stop && !j.Spawns() {
					return j.Namespace + sep + j.ID
				}
				return ""
			},
			"token": func(v any) string {
				if j := v.(*Job); j.DispatchIdempotencyToken != "" {
					return j.Namespace + sep + j.ParentID + sep + j.DispatchIdempotencyToken
				}
				return ""
			},
		},
	},
	{
		Name: TableJobVersions, Record: 9, New: func() any { return new(Job) },
		key: func(v any) string { j := v.(*Job); return j.Namespace + sep + j.ID + sep + seq(j.Version) },
		by: map[string]func(any) string{
			"services": func(v any) string {
				if j := v.(*Job); j.hasServices() {
					return j.Namespace + sep + j.ID
				}
				return ""
			},
		},
	},
	{
		Name: TableSubmissions, Record: 29, New: func() any { return new(JobSubmission) },
		key: func(v any) string {
			s := v.(*JobSubmission)
			return s.Namespace + sep + s.JobID + sep + seq(s.Version)
		},
	},
	{
		Name: TableSummaries, Record: 7, New: func() any { return new(JobSummary) },
		key:  func(v any) string { s := v.(*JobSummary); return s.Namespace + sep + s.JobID },
		pack: func(x *interner, v any) { v.(*JobSummary).share(x) },
	},
	{
		Name: TableEvals, Record: 3, New: func() any { return new(Evaluation) },
		key:   func(v any) string { return v.(*Evaluation).ID },
		rests: func(v any) (int64, bool) { e := v.(*Evaluation); return e.ModifyTime, e.Terminal() },
		by: map[string]func(any) string{
			"job": func(v any) string { e := v.(*Evaluation); return e.Namespace + sep + e.JobID },
			"open": func(v any) string { // by its last change: see OpenEvalsFrom
				if e := v.(*Evaluation); !e.Terminal() {
					return seq(e.ModifyIndex)
				}
				return ""
			},
			"short": func(v any) string { // the first in line first: see EvalsShortOfRoom
				if e := v.(*Evaluation); e.shortOfRoom() {
					return seq(uint64(maxPriority-min(e.Priority, maxPriority))) + seq(e.CreateIndex)
				}
				return ""
			},
			"claims": func(v any) string {
				if e := v.(*Evaluation); len(e.Claims) > 0 && !e.Terminal() {
					return e.ID
				}
				return ""
			},
		},
	},
	{
		Name: TableAllocs, Record: 4, New: func() any { return new(Allocation) },
		key:  func(v any) string { return v.(*Allocation).ID },
		pack: func(_ *interner, v any) { v.(*Allocation).pack() },
		by: map[string]func(any) string{
			"job":  func(v any) string { a := v.(*Allocation); return a.Namespace + sep + a.JobID },
			"node": func(v any) string { return v.(*Allocation).NodeID },
			"holds": func(v any) string {
				if a := v.(*Allocation); a.Occupies() {
					return a.NodeID
				}
				return ""
			},
			"eval":       func(v any) string { return v.(*Allocation).EvalID },
			"deployment": func(v any) string { return v.(*Allocation).DeploymentID },
			"serving": func(v any) string {
				if s := v.(*Allocation).Serving; s != nil {
					return s.Model
				}
				return ""
			},
		},
	},
	{
		Name: TableDeployments, Record: 10, New: func() any { return new(Deployment) },
		key:   func(v any) string { return v.(*Deployment).ID },
		rests: func(v any) (int64, bool) { d := v.(*Deployment); return d.ModifyTime, !d.Active() },
		by: map[string]func(any) string{
			"job": func(v any) string { d := v.(*Deployment); return d.Namespace + sep + d.JobID },
			"active": func(v any) string {
				if d := v.(*Deployment); d.Active() {
					return d.Status
				}
				return ""
			},
		},
	},
	{
		Name: TableModels, Record: 200, New: func() any { return new(Model) },
		key: func(v any) string { return v.(*Model).Name },
	},
	{
		Name: TableModelVersions, Record: 201, New: func() any { return new(ModelVersion) },
		key: func(v any) string { m := v.(*ModelVersion); return m.Model + sep + seq(m.Version) },
		by: map[string]func(any) string{
			"origin": func(v any) string {
				if o := v.(*ModelVersion).Origin; o != nil {
					return o.Namespace + sep + o.JobID
				}
				return ""
			},
		},
	},
	{
		Name: TableScheduler, Record: 13, New: func() any { return new(SchedulerConfiguration) },
		key: func(any) string { return "config" },
	},
	{
		Name: TableFleetHold, Record: 206, New: func() any { return new(FleetHold) },
		key: func(any) string { return "hold" },
	},
	aclPolicyTable,
	aclTokenTable,
	introTokenTable,
	enrollmentTable,
	{
		Name: TableServers, Record: 203, New: func() any { return new(Server) },
		key: func(v any) string { return v.(*Server).ID },
	},
	{
		Name: TableAutopilot, Record: 205, New: func() any { return new(AutopilotConfig) },
		key: func(any) string { return "config" },
	},
	{
		Name: TableClusterMeta, Record: 14, New: func() any { return new(ClusterMeta) },
		key: func(any) string { return "meta" },
	},
	{
		Name: TablePeriodicLaunches, Record: 6, New: func() any { return new(PeriodicLaunch) },
		key: func(v any) string { l := v.(*PeriodicLaunch); return l.Namespace + sep + l.ID },
	},
	namespaceTable,
	quotaTable,
	{
		Name: TableScalingEvents, Record: 19, New: func() any { return new(JobScaling) },
		key: func(v any) string { s := v.(*JobScaling); return s.Namespace + sep + s.JobID },
	},
	{
		Name: TableResults, Record: 202, New: func() any { return new(resultEntry) },
		key: func(v any) string { return v.(*resultEntry).RequestID },
	},
}

// allTables are those of snapshots, and those that follow from them.
var allTables = append(slices.Clip(Tables), usageTable)

// tableByName finds tables, with what follows from their place in allTables filled in.
var tableByName = func() map[string]*Table {
	byName := map[string]*Table{}
	for i, t := range allTables {
		t.number = i
		for _, name := range sortedKeys(t.by) {
			t.indexes = append(t.indexes, secondary{name, t.by[name]})
		}
		byName[t.Name] = t
	}
	return byName
}()

// State is everything that the servers of a region agree on. Apply and ApplyBatch are called by
// one goroutine (the log's); Snapshot may be called by any.
type State struct {
	hub       *hub
	abandoned chan struct{}
	edits     edit           // writes so far
	seq       uint64         // of the newest kept result
	kept      map[string]int // request ID → position in the results
	keep      int            // results at most
	shared    *interner
	uses      map[string]*NodeUse // by node ID; what was added up already
}

// NewState returns an empty state.
func NewState() *State {
	s := &State{hub: newHub(), abandoned: make(chan struct{}), kept: map[string]int{}, keep: MaxResults, shared: newInterner(internBits), uses: map[string]*NodeUse{}}
	v := &view{hub: s.hub}
	for _, t := range allTables {
		v.rows = append(v.rows, newRows(tableByName[t.Name], 0))
	}
	s.hub.current.Store(v)
	return s
}

// Abandon wakes every blocking query on this state; called when another state
// (a restored snapshot) takes its place.
func (s *State) Abandon() { close(s.abandoned) }

// Snapshot returns a consistent view that later commands do not change.
func (s *State) Snapshot() *Snapshot {
	return &Snapshot{txn: s.hub.current.Load(), abandoned: s.abandoned}
}

// Snapshot is a consistent view of a State. Records read from it are shared: do
// not change them. Each read adds what it depends on to ws when ws is not nil.
// Lookups give nil for what is not there. It may be used by several goroutines.
type Snapshot struct {
	txn       *view
	abandoned <-chan struct{}
}

// Abandoned is closed when the state behind the snapshot was replaced.
func (s *Snapshot) Abandoned() <-chan struct{} { return s.abandoned }

// Index is the highest index of the given tables, of all tables when none is given.
func (s *Snapshot) Index(ws WatchSet, tables ...string) uint64 {
	var max uint64
	if len(tables) == 0 {
		for _, e := range s.txn.index {
			if e.Index > max {
				max = e.Index
			}
		}
		if ws != nil {
			s.txn.watchIndex(ws, "", true)
		}
		return max
	}
	for _, t := range tables {
		if i := s.txn.indexOf(t); i > max {
			max = i
		}
		if ws != nil {
			s.txn.watchIndex(ws, t, false)
		}
	}
	return max
}

// Node returns a node by its whole ID.
func (s *Snapshot) Node(ws WatchSet, id string) *Node {
	return first[Node](s.txn, ws, TableNodes, "id", id)
}

// Nodes returns the nodes whose ID begins with prefix, by ID.
func (s *Snapshot) Nodes(ws WatchSet, prefix string) []*Node {
	return list[Node](s.txn, ws, TableNodes, "id_prefix", prefix)
}

// Job returns the current version of a job.
func (s *Snapshot) Job(ws WatchSet, k JobKey) *Job {
	return first[Job](s.txn, ws, TableJobs, "id", k.Namespace, k.ID)
}

// Jobs returns the jobs of a namespace ("*": of all) whose ID begins with
// prefix, by namespace and ID.
func (s *Snapshot) Jobs(ws WatchSet, namespace, prefix string) []*Job {
	if namespace != "*" {
		return list[Job](s.txn, ws, TableJobs, "id_prefix", namespace, prefix)
	}
	all := list[Job](s.txn, ws, TableJobs, "id_prefix", "")
	if prefix == "" {
		return all
	}
	var out []*Job
	for _, j := range all {
		if strings.HasPrefix(j.ID, prefix) {
			out = append(out, j)
		}
	}
	return out
}

// JobVersion returns one version of a job.
func (s *Snapshot) JobVersion(ws WatchSet, k JobKey, version uint64) *Job {
	return first[Job](s.txn, ws, TableJobVersions, "id", k.Namespace, k.ID, seq(version))
}

// JobVersions returns the kept versions of a job, newest first.
func (s *Snapshot) JobVersions(ws WatchSet, k JobKey) []*Job {
	return reverse(list[Job](s.txn, ws, TableJobVersions, "id_prefix", k.Namespace, k.ID, ""))
}

// Submission returns the source of a job version.
func (s *Snapshot) Submission(ws WatchSet, k JobKey, version uint64) *JobSubmission {
	return first[JobSubmission](s.txn, ws, TableSubmissions, "id", k.Namespace, k.ID, seq(version))
}

// Summary returns a job's counts.
func (s *Snapshot) Summary(ws WatchSet, k JobKey) *JobSummary {
	return first[JobSummary](s.txn, ws, TableSummaries, "id", k.Namespace, k.ID)
}

// Eval returns an evaluation by its whole ID.
func (s *Snapshot) Eval(ws WatchSet, id string) *Evaluation {
	return first[Evaluation](s.txn, ws, TableEvals, "id", id)
}

// Evals returns the evaluations whose ID begins with prefix, by ID.
func (s *Snapshot) Evals(ws WatchSet, prefix string) []*Evaluation {
	return list[Evaluation](s.txn, ws, TableEvals, "id_prefix", prefix)
}

// EvalsByJob returns a job's evaluations.
func (s *Snapshot) EvalsByJob(ws WatchSet, k JobKey) []*Evaluation {
	return list[Evaluation](s.txn, ws, TableEvals, "job", k.Namespace, k.ID)
}

// OpenEvalsByJob returns the evaluations of a job that are not answered yet.
func (s *Snapshot) OpenEvalsByJob(k JobKey) (open []*Evaluation) {
	q := newQuery(TableEvals, "job", []string{k.Namespace, k.ID})
	r := s.txn.rows[q.table.number]
	r.find(q, func(at slot) bool {
		if e, ok := r.records.get(at).(*Evaluation); ok { // the others are at rest
			open = append(open, e)
		}
		return true
	})
	return open
}

// Ended is a record that has come to its end, and when, in Unix nanoseconds.
type Ended struct {
	ID string
	At int64
}

// EndedEvals gives the answered evaluations of a job without reading them.
func (s *Snapshot) EndedEvals(k JobKey) []Ended { return s.txn.ended(TableEvals, k) }

// EndedDeployments gives a job's deployments that have ended, without reading them.
func (s *Snapshot) EndedDeployments(k JobKey) []Ended { return s.txn.ended(TableDeployments, k) }

// OpenEvals returns the evaluations that are not terminal, pending and blocked, in the
// order of their last changes.
func (s *Snapshot) OpenEvals(ws WatchSet) []*Evaluation {
	return list[Evaluation](s.txn, ws, TableEvals, "open_prefix", "")
}

// OpenEvalsFrom returns those of OpenEvals that were changed at the index or later: what
// is new to a reader who has seen an older snapshot. ws tells of any change of an open
// evaluation, an older one's end included; it may fire once too often.
func (s *Snapshot) OpenEvalsFrom(ws WatchSet, index uint64) (open []*Evaluation) {
	q := newQuery(TableEvals, "open_prefix", nil)
	rows := s.txn.rows[q.table.number]
	byChange := rows.by[q.by]
	byChange.from(seq(index), func(_ string, x *set) bool {
		return x.each(func(at slot) bool {
			open = append(open, rows.at(at).(*Evaluation))
			return true
		})
	})
	if ws != nil { // a change of a record moves it in this index, so nothing needs to be compared one by one
		s.txn.hub.watch(ws, watchKey{TableEvals, "open"}, "", true, func(now *view) bool {
			return now.rows[q.table.number].by[q.by].root == byChange.root
		})
	}
	return open
}

// Alloc returns an allocation by its whole ID, with TaskStates and Metrics. The lists
// of allocations leave both packed: Whole gives them.
func (s *Snapshot) Alloc(ws WatchSet, id string) *Allocation {
	if a := first[Allocation](s.txn, ws, TableAllocs, "id", id); a != nil {
		return a.Whole()
	}
	return nil
}

// NodeOf names the node of an allocation, "" when there is no such allocation.
func (s *Snapshot) NodeOf(allocID string) string {
	if a := first[Allocation](s.txn, nil, TableAllocs, "id", allocID); a != nil {
		return a.NodeID
	}
	return ""
}

// Allocs returns the allocations whose ID begins with prefix, by ID.
func (s *Snapshot) Allocs(ws WatchSet, prefix string) []*Allocation {
	return list[Allocation](s.txn, ws, TableAllocs, "id_prefix", prefix)
}

// AllocsByJob returns a job's allocations, those of purged jobs of that name included.
func (s *Snapshot) AllocsByJob(ws WatchSet, k JobKey) []*Allocation {
	return list[Allocation](s.txn, ws, TableAllocs, "job", k.Namespace, k.ID)
}

// AllocsByNode returns a node's allocations, terminal ones included.
func (s *Snapshot) AllocsByNode(ws WatchSet, nodeID string) []*Allocation {
	return list[Allocation](s.txn, ws, TableAllocs, "node", nodeID)
}

// AllocsHolding returns the allocations that hold resources of a node.
func (s *Snapshot) AllocsHolding(ws WatchSet, nodeID string) []*Allocation {
	return list[Allocation](s.txn, ws, TableAllocs, "holds", nodeID)
}

// AllocsByEval returns the allocations that an evaluation placed.
func (s *Snapshot) AllocsByEval(ws WatchSet, evalID string) []*Allocation {
	return list[Allocation](s.txn, ws, TableAllocs, "eval", evalID)
}

// AllocsByDeployment returns a deployment's allocations.
func (s *Snapshot) AllocsByDeployment(ws WatchSet, id string) []*Allocation {
	return list[Allocation](s.txn, ws, TableAllocs, "deployment", id)
}

// AllocsServing returns the allocations that serve a model ("": any model), by model.
func (s *Snapshot) AllocsServing(ws WatchSet, model string) []*Allocation {
	if model == "" {
		return list[Allocation](s.txn, ws, TableAllocs, "serving_prefix", "")
	}
	return list[Allocation](s.txn, ws, TableAllocs, "serving", model)
}

// Deployment returns a deployment by its whole ID.
func (s *Snapshot) Deployment(ws WatchSet, id string) *Deployment {
	return first[Deployment](s.txn, ws, TableDeployments, "id", id)
}

// Deployments returns the deployments whose ID begins with prefix, by ID.
func (s *Snapshot) Deployments(ws WatchSet, prefix string) []*Deployment {
	return list[Deployment](s.txn, ws, TableDeployments, "id_prefix", prefix)
}

// ActiveDeployments returns the deployments that are under way.
func (s *Snapshot) ActiveDeployments(ws WatchSet) []*Deployment {
	return list[Deployment](s.txn, ws, TableDeployments, "active_prefix", "")
}

// DeploymentsByJob returns a job's deployments.
func (s *Snapshot) DeploymentsByJob(ws WatchSet, k JobKey) []*Deployment {
	return list[Deployment](s.txn, ws, TableDeployments, "job", k.Namespace, k.ID)
}

// LatestDeployment returns the job's newest deployment.
func (s *Snapshot) LatestDeployment(ws WatchSet, k JobKey) *Deployment {
	var latest *Deployment
	for _, d := range s.DeploymentsByJob(ws, k) {
		if latest == nil || d.CreateIndex > latest.CreateIndex {
			latest = d
		}
	}
	return latest
}

// Model returns a model by name.
func (s *Snapshot) Model(ws WatchSet, name string) *Model {
	return first[Model](s.txn, ws, TableModels, "id", name)
}

// Models returns all models by name.
func (s *Snapshot) Models(ws WatchSet) []*Model {
	return list[Model](s.txn, ws, TableModels, "id_prefix", "")
}

// ModelVersion returns one version of a model.
func (s *Snapshot) ModelVersion(ws WatchSet, model string, version uint64) *ModelVersion {
	return first[ModelVersion](s.txn, ws, TableModelVersions, "id", model, seq(version))
}

// ModelVersions returns a model's versions, newest first.
func (s *Snapshot) ModelVersions(ws WatchSet, model string) []*ModelVersion {
	return reverse(list[ModelVersion](s.txn, ws, TableModelVersions, "id_prefix", model, ""))
}

// SchedulerConfig returns the scheduler settings, the defaults when never set.
func (s *Snapshot) SchedulerConfig(ws WatchSet) *SchedulerConfiguration {
	if c := first[SchedulerConfiguration](s.txn, ws, TableScheduler, "id", "config"); c != nil {
		return c
	}
	return &SchedulerConfiguration{SchedulerAlgorithm: "binpack"}
}

// TableOf finds a table by its record byte; nil when unknown.
func TableOf(record byte) *Table {
	for _, t := range Tables {
		if t.Record == record {
			return t
		}
	}
	return nil
}
