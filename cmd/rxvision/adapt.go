package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/raftstore"
	"github.com/rxvision/rxvision/scheduler"
)

// The siblings meet here: each adapter gives one package what another declares.

// planner answers api's dry runs by the scheduler's. What the leader's queue says it asks through the store.
type planner struct {
	runs  *scheduler.DryRuns
	store *raftstore.Store
}

func (p planner) DryRun(_ context.Context, snap *cluster.Snapshot, job *cluster.Job) (*api.DryRun, error) {
	res, err := p.runs.DryRun(snap, job, cluster.TimeOf(time.Now()))
	if err != nil {
		return nil, err
	}
	follow := slices.DeleteFunc(slices.Clone(res.Plan.Evals), func(e *cluster.Evaluation) bool { return e.ID == res.Plan.EvalID })
	return &api.DryRun{Annotations: res.Annotations, Failed: res.Failed, Evals: follow}, nil
}

func (p planner) WhatIf(_ context.Context, snap *cluster.Snapshot, job *cluster.Job) (*cluster.Explanation, error) {
	return p.runs.WhatIf(snap, job, cluster.TimeOf(time.Now()))
}

func (p planner) Explain(ctx context.Context, snap *cluster.Snapshot, key cluster.JobKey) (*cluster.Explanation, error) {
	x := p.runs.Explain(snap, key, cluster.TimeOf(time.Now()))
	if x == nil || len(x.Evaluations) == 0 {
		return x, nil
	}
	q, err := json.Marshal(question{JobKey: key})
	if err != nil {
		return nil, err
	}
	answer, err := p.store.Ask(ctx, q)
	switch {
	case cluster.CodeOf(err) == cluster.CodeUnsupported, status.Code(err) == codes.Unimplemented: // an older leader
		return x, nil
	case err != nil:
		return nil, err
	}
	return x, json.Unmarshal(answer, &x.Queue)
}

// ScalingStatus asks the leader how it found a policy.
func (p planner) ScalingStatus(ctx context.Context, id string) (*cluster.ScalingStatus, error) {
	q, err := json.Marshal(question{Policy: id})
	if err != nil {
		return nil, err
	}
	answer, err := p.store.Ask(ctx, q)
	if err != nil {
		return nil, err
	}
	var s *cluster.ScalingStatus
	return s, json.Unmarshal(answer, &s)
}

// question is what servers ask the leader: where a job stands in its queue, or how a scaling policy fares.
type question struct {
	cluster.JobKey
	Policy string `json:",omitempty"`
}

// answers says what only the leader's scheduler knows.
func answers(sched *scheduler.Scheduler) raftstore.Answerer {
	return func(_ context.Context, asked []byte) ([]byte, error) {
		var q question
		if err := json.Unmarshal(asked, &q); err != nil {
			return nil, cluster.Errorf(cluster.CodeInvalid, "a question to the leader that cannot be read: %v", err)
		}
		var answer any
		var err error
		if q.Policy != "" {
			answer, err = sched.ScalingStatus(q.Policy)
		} else {
			answer, err = sched.Position(q.JobKey)
		}
		if err != nil {
			return nil, err
		}
		return json.Marshal(answer)
	}
}

// archives gives api the store's archives.
type archives struct{ store *raftstore.Store }

func (a archives) Save(ctx context.Context) (*api.Archive, error) {
	ar, err := a.store.SaveArchive(ctx)
	if err != nil {
		return nil, err
	}
	return &api.Archive{ReadCloser: ar, Length: ar.Length, Digest: ar.Digest}, nil
}

func (a archives) Restore(ctx context.Context, r io.Reader) error {
	_, err := a.store.RestoreArchive(ctx, r)
	return err
}

// servers gives api the region's servers; end ends this one.
type servers struct {
	store *raftstore.Store
	end   func()
}

func (s servers) Peers() ([]api.Peer, uint64, error) {
	configured, index, err := s.store.Servers()
	if err != nil {
		return nil, 0, err
	}
	members := map[string]bool{}
	for _, m := range configured {
		members[m.ID] = true
	}
	var out []api.Peer
	for _, m := range s.store.Members() {
		out = append(out, api.Peer{
			ID: m.ID, Name: m.Name, Region: m.Region, Datacenter: m.Datacenter, Version: m.Version, Address: m.RaftAddr,
			HTTPAddr: m.HTTPAddr, RPCAddr: m.RPCAddr, Status: m.Status, Leader: m.Leader, Voter: m.Voter, Member: members[m.ID],
		})
	}
	return out, index, nil
}

func (s servers) Remove(ctx context.Context, id string) error { return s.store.RemoveServer(ctx, id) }

func (s servers) Leave(ctx context.Context) error {
	if err := s.store.Leave(ctx); err != nil {
		return err
	}
	s.end()
	return nil
}

func (s servers) Transfer(ctx context.Context, id string) error {
	return s.store.TransferLeadership(ctx, id)
}

func (s servers) Health(ctx context.Context) (*api.ServersHealth, error) {
	h, err := s.store.Health(ctx)
	if err != nil {
		return nil, err
	}
	out := &api.ServersHealth{Healthy: h.Healthy, FailureTolerance: h.FailureTolerance, Leader: h.Leader, Voters: h.Voters}
	for _, p := range h.Servers {
		out.Servers = append(out.Servers, api.PeerHealth{
			ID: p.ID, Name: p.Name, Address: p.Address, SerfStatus: p.Status, Version: p.Version, Leader: p.Leader,
			LastContact: p.LastContact, LastTerm: p.LastTerm, LastIndex: p.LastIndex, Healthy: p.Healthy, Voter: p.Voter, StableSince: p.StableSince,
		})
	}
	return out, nil
}

func (s servers) Disk() error { return diskError(s.store.DiskState()) }

func diskError(d raftstore.DiskState) error {
	if d.OK {
		return nil
	}
	return cluster.Errorf(cluster.CodeUnavailable, "this server cannot write since %s: %s", d.Since.UTC().Format(time.RFC3339), d.Reason)
}

// frozen is the same of a server whose disk cannot be written.
type frozen struct {
	store *raftstore.ReadOnly
	conf  serverConfig
}

func (f frozen) Peers() ([]api.Peer, uint64, error) {
	configured, index, err := f.store.Servers()
	var out []api.Peer
	for _, m := range configured {
		out = append(out, api.Peer{
			ID: m.ID, Name: m.Name, Region: f.conf.region, Datacenter: f.conf.datacenter, Address: m.Address, Status: "failed", Voter: m.Voter, Member: true,
		})
	}
	return out, index, err
}

func (f frozen) Remove(context.Context, string) error { return f.store.Err() }

func (f frozen) Leave(context.Context) error { return f.store.Err() }

func (f frozen) Transfer(context.Context, string) error { return f.store.Err() }

func (f frozen) Health(context.Context) (*api.ServersHealth, error) { return nil, f.store.Err() }

func (f frozen) Disk() error { return diskError(f.store.DiskState()) }

// peerNet gives the fleet its way to the other servers.
type peerNet struct{ store *raftstore.Store }

func (n peerNet) Self() string { return n.store.ID() }

func (n peerNet) Servers() (ids []string) {
	for _, m := range n.store.Members() {
		if m.Status != raftstore.MemberLeft {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

func (n peerNet) Leader() (id string, ok bool) {
	id, _ = n.store.Leader()
	return id, id != ""
}

func (n peerNet) Contact() time.Duration { return n.store.LastContact() }

func (n peerNet) Listener() net.Listener { return n.store.PeerListener() }

func (n peerNet) Dial(ctx context.Context, serverID string) (net.Conn, error) {
	return n.store.DialPeer(ctx, serverID)
}

// callNodes asks nodes over their own streams.
type callNodes struct{ fleet *fleet.Server }

// frames turns a node's chunks into api's frames.
type frames struct{ *fleet.Answer }

func (f frames) Next() (api.Frame, error) {
	c, err := f.Recv()
	if err != nil {
		return api.Frame{}, err
	}
	return api.Frame{Data: c.Data, File: c.File, Offset: c.Offset, FileEvent: c.FileEvent}, nil
}

func (n callNodes) stream(ctx context.Context, nodeID string, call *pb.Call) (api.Frames, error) {
	a, err := n.fleet.Call(ctx, nodeID, call)
	if err != nil {
		return nil, err
	}
	return frames{a}, nil
}

func (n callNodes) one(ctx context.Context, nodeID string, call *pb.Call) (json.RawMessage, error) {
	a, err := n.fleet.Call(ctx, nodeID, call)
	if err != nil {
		return nil, err
	}
	return a.One()
}

// none is for calls that answer nothing but an error.
func (n callNodes) none(ctx context.Context, nodeID string, call *pb.Call) error {
	a, err := n.fleet.Call(ctx, nodeID, call)
	if err != nil {
		return err
	}
	defer a.Close()
	for {
		if _, err := a.Recv(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func (n callNodes) Logs(ctx context.Context, nodeID string, r api.LogsRequest) (api.Frames, error) {
	return n.stream(ctx, nodeID, &pb.Call{Request: &pb.Call_Logs{Logs: &pb.LogsRequest{
		AllocId: r.AllocID, Task: r.Task, Type: r.Type, Follow: r.Follow, Origin: r.Origin, Offset: r.Offset,
	}}})
}

func (n callNodes) File(ctx context.Context, nodeID string, r api.FileRequest) (api.Frames, error) {
	return n.stream(ctx, nodeID, &pb.Call{Request: &pb.Call_File{File: &pb.FileRequest{
		AllocId: r.AllocID, Op: r.Op, Path: r.Path, Origin: r.Origin, Offset: r.Offset, Limit: r.Limit, Follow: r.Follow,
	}}})
}

func (n callNodes) NodeStats(ctx context.Context, nodeID string) (json.RawMessage, error) {
	return n.one(ctx, nodeID, &pb.Call{Request: &pb.Call_NodeStats{NodeStats: &pb.NodeStatsRequest{}}})
}

func (n callNodes) AllocStats(ctx context.Context, nodeID, allocID, task string) (json.RawMessage, error) {
	return n.one(ctx, nodeID, &pb.Call{Request: &pb.Call_AllocStats{AllocStats: &pb.AllocStatsRequest{AllocId: allocID, Task: task}}})
}

func (n callNodes) Checks(ctx context.Context, nodeID, allocID string) (json.RawMessage, error) {
	return n.one(ctx, nodeID, &pb.Call{Request: &pb.Call_Checks{Checks: &pb.ChecksRequest{AllocId: allocID}}})
}

func (n callNodes) Restart(ctx context.Context, nodeID string, r api.RestartRequest) error {
	return n.none(ctx, nodeID, &pb.Call{Request: &pb.Call_Restart{Restart: &pb.RestartRequest{AllocId: r.AllocID, Task: r.Task, AllTasks: r.AllTasks}}})
}

func (n callNodes) Signal(ctx context.Context, nodeID string, r api.SignalRequest) error {
	return n.none(ctx, nodeID, &pb.Call{Request: &pb.Call_Signal{Signal: &pb.SignalRequest{AllocId: r.AllocID, Task: r.Task, Signal: r.Signal}}})
}
