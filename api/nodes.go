package api

import (
	"slices"
	"time"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
)

// nodeStub is a node in a list.
type nodeStub struct {
	Address               string
	ID                    string
	Attributes            map[string]string `json:",omitempty"`
	Datacenter            string
	Name                  string
	NodeClass             string
	NodePool              string
	Version               string
	Drain                 bool
	SchedulingEligibility string
	Status                string
	StatusDescription     string
	Drivers               map[string]*cluster.DriverInfo
	HostVolumes           struct{}
	NodeResources         *cluster.NodeResources         `json:",omitempty"`
	ReservedResources     *cluster.NodeReservedResources `json:",omitempty"`
	LastDrain             *cluster.DrainMetadata
	CreateIndex           uint64
	ModifyIndex           uint64
}

// nodeFields are the parts of a stub that a client asks for.
type nodeFields struct{ os, resources bool }

func stubOfNode(n *cluster.Node, f nodeFields) *nodeStub {
	stub := &nodeStub{
		Address: n.Attributes["unique.network.ip-address"], ID: n.ID, Datacenter: n.Datacenter, Name: n.Name,
		NodeClass: n.NodeClass, NodePool: n.NodePool, Version: n.Attributes["nomad.version"], Drain: n.Drain,
		SchedulingEligibility: n.SchedulingEligibility, Status: n.Status, StatusDescription: n.StatusDescription,
		Drivers: n.Drivers, LastDrain: n.LastDrain, CreateIndex: n.CreateIndex, ModifyIndex: n.ModifyIndex,
	}
	if f.os {
		stub.Attributes = map[string]string{"os.name": n.Attributes["os.name"]}
	}
	if f.resources {
		stub.NodeResources, stub.ReservedResources = n.NodeResources, n.ReservedResources
	}
	return stub
}

// node is a node as clients read it.
type node struct {
	*cluster.Node
	NodeResources        *cluster.NodeResources
	ReservedResources    *cluster.NodeReservedResources
	SecretID             string // always empty: secrets do not leave
	TLSEnabled           bool
	Links                map[string]string
	HostVolumes          map[string]any
	HostNetworks         map[string]any
	CSIControllerPlugins map[string]any
	CSINodePlugins       map[string]any
	NodeMaxAllocs        int
}

func showNode(n *cluster.Node) *node {
	out := &node{
		Node: n, NodeResources: n.NodeResources, ReservedResources: n.ReservedResources,
		Links: map[string]string{}, HostVolumes: map[string]any{}, HostNetworks: map[string]any{},
		CSIControllerPlugins: map[string]any{}, CSINodePlugins: map[string]any{},
	}
	// The command line crashes without them.
	if out.NodeResources == nil {
		out.NodeResources = &cluster.NodeResources{}
	}
	if out.ReservedResources == nil {
		out.ReservedResources = &cluster.NodeReservedResources{}
	}
	return out
}

func (s *Server) listNodes(r *request) (any, error) {
	prefix, err := r.idPrefix("node")
	if err != nil {
		return nil, err
	}
	var f nodeFields
	if f.os, err = r.flag("os", true); err != nil {
		return nil, err
	}
	if f.resources, err = r.flag("resources", true); err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		return nodePage(r, snap, ws, snap.Nodes(ws, prefix), f)
	})
}

func nodePage(r *request, snap *cluster.Snapshot, ws cluster.WatchSet, nodes []*cluster.Node, f nodeFields) found {
	at := func(n *cluster.Node) position { return named(n.ID) }
	stub := func(n *cluster.Node) any { return stubOfNode(n, f) }
	return page(r, snap.Index(ws, cluster.TableNodes), nodes, true, at, stub, stub)
}

func (s *Server) readNode(r *request) (any, error) {
	id, err := wholeUUID(r.params["id"], "node")
	if err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		n := snap.Node(ws, id)
		if n == nil {
			return missing(snap, ws, cluster.TableNodes, "node not found")
		}
		return found{body: showNode(n), index: n.ModifyIndex}
	})
}

func (s *Server) nodeAllocs(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		at := func(a *cluster.Allocation) position { return created(a.CreateIndex, a.ID) }
		datum := func(a *cluster.Allocation) any { return a.Whole() }
		show := func(a *cluster.Allocation) any { return showAlloc(snap, a) }
		allocs := seen(r, acl.ReadJob, snap.AllocsByNode(ws, r.params["id"]), allocNamespace)
		return page(r, snap.Index(ws, cluster.TableAllocs), allocs, false, at, datum, show)
	})
}

// nodeChanged is the answer to changes of a node.
type nodeChanged struct {
	EvalIDs         []string
	EvalCreateIndex uint64
	NodeModifyIndex uint64
	Index           uint64
}

// changeNode commits a command about the node that the route names.
func (s *Server) changeNode(r *request, cmd func(id string) cluster.Command) (any, error) {
	id, err := wholeUUID(r.params["id"], "node")
	if err != nil {
		return nil, err
	}
	res, err := s.cfg.Store.Apply(r.Context(), cmd(id))
	if err != nil {
		if cluster.CodeOf(err) == cluster.CodeNotFound {
			return nil, err
		}
		return nil, refused(err)
	}
	return &answer{body: &nodeChanged{NodeModifyIndex: res.Index, Index: res.Index}, index: res.Index}, nil
}

// bodyNode compares the node that a body names with the route's.
func bodyNode(r *request, id string) error {
	if id != "" && id != r.params["id"] {
		return badRequest("node ID of the body does not match the path")
	}
	return nil
}

func (s *Server) setEligibility(r *request) (any, error) {
	var req struct{ NodeID, Eligibility string }
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if err := bodyNode(r, req.NodeID); err != nil {
		return nil, err
	}
	return s.changeNode(r, func(id string) cluster.Command {
		return &cluster.UpdateEligibility{NodeID: id, Eligibility: req.Eligibility}
	})
}

func (s *Server) drainNode(r *request) (any, error) {
	var req struct {
		NodeID    string
		DrainSpec *struct {
			Deadline         time.Duration
			IgnoreSystemJobs bool
		}
		MarkEligible bool
		Meta         map[string]string
	}
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if err := bodyNode(r, req.NodeID); err != nil {
		return nil, err
	}
	return s.changeNode(r, func(id string) cluster.Command {
		cmd := &cluster.UpdateDrain{NodeID: id, MarkEligible: req.MarkEligible, Meta: req.Meta}
		if req.DrainSpec != nil {
			cmd.Strategy = &cluster.DrainStrategy{Deadline: req.DrainSpec.Deadline, IgnoreSystemJobs: req.DrainSpec.IgnoreSystemJobs}
		}
		return cmd
	})
}

func (s *Server) purgeNode(r *request) (any, error) {
	return s.changeNode(r, func(id string) cluster.Command { return &cluster.DeregisterNode{NodeID: id} })
}

// evaluateNode asks for an evaluation of each job with work on the node, and of each that
// is to run on every node.
func (s *Server) evaluateNode(r *request) (any, error) {
	id, err := wholeUUID(r.params["id"], "node")
	if err != nil {
		return nil, err
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	snap := s.cfg.Store.State().Snapshot()
	n := snap.Node(nil, id)
	if n == nil {
		return nil, notFound("node not found")
	}
	cmd, seen := &cluster.UpdateEvals{}, map[cluster.JobKey]bool{}
	reply := &nodeChanged{EvalIDs: []string{}, NodeModifyIndex: n.ModifyIndex}
	var jobs []*cluster.Job
	for _, a := range snap.AllocsByNode(nil, id) {
		if j := snap.Job(nil, a.JobKey()); !a.Terminal() && j != nil {
			jobs = append(jobs, j)
		}
	}
	for _, j := range snap.PerNodeJobs(nil) {
		if j.Covers(n) {
			jobs = append(jobs, j)
		}
	}
	for _, j := range jobs {
		if seen[j.Key()] {
			continue
		}
		seen[j.Key()] = true
		e := newEval(j, cluster.TriggerNodeUpdate)
		e.NodeID, e.NodeModifyIndex = id, n.ModifyIndex
		cmd.Evals = append(cmd.Evals, e)
		reply.EvalIDs = append(reply.EvalIDs, e.ID)
	}
	if len(cmd.Evals) == 0 {
		reply.Index = n.ModifyIndex
		return &answer{body: reply, index: reply.Index}, nil
	}
	res, err := s.cfg.Store.Apply(r.Context(), cmd)
	if err != nil {
		return nil, refused(err)
	}
	reply.EvalCreateIndex, reply.Index = res.Index, res.Index
	return &answer{body: reply, index: res.Index}, nil
}

// nodePool is a pool as clients read it.
type nodePool struct {
	Name, Description        string
	Meta                     map[string]string
	SchedulerConfiguration   *struct{}
	CreateIndex, ModifyIndex uint64
}

var descriptions = map[string]string{
	cluster.NodePoolAll:     "Node pool with all nodes in the cluster.",
	cluster.DefaultNodePool: "Default node pool.",
}

// pools are the built-in ones and those that nodes say they are in.
func pools(nodes []*cluster.Node) []*nodePool {
	names := map[string]bool{cluster.NodePoolAll: true, cluster.DefaultNodePool: true}
	for _, n := range nodes {
		if n.NodePool != "" {
			names[n.NodePool] = true
		}
	}
	var out []*nodePool
	for _, name := range sortedKeys(names) {
		out = append(out, &nodePool{Name: name, Description: descriptions[name], CreateIndex: 1, ModifyIndex: 1})
	}
	return out
}

func (s *Server) listPools(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		list := only(pools(snap.Nodes(ws, "")), func(p *nodePool) bool {
			return hasPrefix(p.Name, r.prefix) && r.may(acl.NodePoolRead, "", p.Name)
		})
		same := func(p *nodePool) any { return p }
		return page(r, max(1, snap.Index(ws, cluster.TableNodes)), list, true, func(p *nodePool) position { return named(p.Name) }, same, same)
	})
}

// pool finds the pool that the route names.
func pool(r *request, snap *cluster.Snapshot, ws cluster.WatchSet) *nodePool {
	list := pools(snap.Nodes(ws, ""))
	i := slices.IndexFunc(list, func(p *nodePool) bool { return p.Name == r.params["pool"] })
	if i < 0 {
		return nil
	}
	return list[i]
}

func (s *Server) readPool(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		if p := pool(r, snap, ws); p != nil {
			return found{body: p, index: max(1, snap.Index(ws, cluster.TableNodes))}
		}
		return missing(snap, ws, cluster.TableNodes, "node pool not found")
	})
}

func (s *Server) poolNodes(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		name := r.params["pool"]
		if pool(r, snap, ws) == nil {
			return missing(snap, ws, cluster.TableNodes, "node pool not found")
		}
		nodes := only(snap.Nodes(ws, ""), func(n *cluster.Node) bool { return name == cluster.NodePoolAll || n.NodePool == name })
		return nodePage(r, snap, ws, nodes, nodeFields{})
	})
}

func (s *Server) poolJobs(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		name := r.params["pool"]
		if pool(r, snap, ws) == nil {
			return missing(snap, ws, cluster.TableNodes, "node pool not found")
		}
		jobs := only(snap.Jobs(ws, r.namespace, ""), func(j *cluster.Job) bool { return j.NodePool == name })
		return s.jobPage(r, snap, ws, jobs, false)
	})
}
