//go:build !race

// Virtual time and the race detector do not go together yet (golang.org/issue/78156): make test runs these without it.

package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// through makes a call at one server to a node that another one holds.
func (n *node) through(ctx context.Context, at *Server) (*Answer, pb.Fleet_AnswerClient) {
	n.Helper()
	ch := make(chan called, 1)
	go func() {
		a, err := at.Call(ctx, n.id, &pb.Call{Request: logs.Request})
		ch <- called{a, err}
	}()
	m := n.next().GetCall()
	if m == nil || m.Id == "" || m.GetLogs().GetTask() != "x" {
		n.Fatalf("the node got %v", m)
	}
	stream := n.open(m.Id)
	got := <-ch
	if got.err != nil {
		n.Fatal(got.err)
	}
	n.Cleanup(got.answer.Close)
	return got.answer, stream
}

func TestCallThroughAnotherServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		n, _ := r.at("s2").join(nodeA)
		s3 := r.members["s3"].srv
		r.until(5*time.Second, "the others know where the node is", func() bool { return s3.Connected(nodeA) && r.members["s1"].srv.Connected(nodeA) })

		a, stream := n.through(t.Context(), s3)
		for i := range 3 * answerQueue {
			if err := stream.Send(&pb.AnswerChunk{Data: []byte{byte(i)}, Offset: int64(i)}); err != nil {
				t.Fatal(err)
			}
			if c, err := a.Recv(); err != nil || c.Offset != int64(i) || !bytes.Equal(c.Data, []byte{byte(i)}) {
				t.Fatalf("chunk %d: %v, %v", i, c, err)
			}
		}
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %v", err)
		}
		// The node's error keeps its code and text.
		a, stream = n.through(t.Context(), s3)
		if err := stream.Send(&pb.AnswerChunk{Error: &pb.Error{Code: string(cluster.CodeNotFound), Text: "no such task"}}); err != nil {
			t.Fatal(err)
		}
		if _, err := a.One(); cluster.CodeOf(err) != cluster.CodeNotFound || err.Error() != "no such task" {
			t.Errorf("the node's error: %v", err)
		}
		// The node hears that nobody listens.
		a, stream = n.through(t.Context(), s3)
		a.Close()
		if _, err := stream.Recv(); status.Code(err) != codes.Canceled {
			t.Errorf("closed: %v", err)
		}
		// A half answer is no whole one.
		a, _ = n.through(t.Context(), s3)
		n.cancel()
		if _, err := a.Recv(); cluster.CodeOf(err) != cluster.CodeUnavailable {
			t.Errorf("the node left: %v", err)
		}
		r.until(5*time.Second, "the others know that it left", func() bool { return !s3.Connected(nodeA) })
		if _, err := s3.Call(t.Context(), nodeA, logs); cluster.CodeOf(err) != cluster.CodeUnavailable || !strings.Contains(err.Error(), "any server") {
			t.Errorf("a node that is nowhere: %v", err)
		}
	})
}

// TestSamplesReachEveryServer: whoever comes to lead knows what was measured, whichever server it was told to, and after that
// one's end.
func TestSamplesReachEveryServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		r.at("s2").join(nodeA)
		s1, s3 := r.members["s1"].srv, r.members["s3"].srv
		r.until(5*time.Second, "the servers talk", func() bool { return s1.Connected(nodeA) && s3.Connected(nodeA) })
		for source, n := range map[string]float64{"gateway/g1": 4, "gateway/g2": 3} {
			if err := r.members["s2"].srv.samples.take(sample("a", cluster.MetricInFlight, n), source, true, time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		knows := func(s *Server) bool {
			sum, ok := s.Mean("a", cluster.MetricInFlight, time.Minute)
			return ok && sum == 7
		}
		r.until(5*time.Second, "the others know", func() bool { return knows(s1) && knows(s3) })
		r.kill("s2")
		if !knows(s1) || !knows(s3) {
			t.Error("what a server told is forgotten with it")
		}
	})
}

func TestCallEndsWithTheServerThatHoldsTheNode(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		n, _ := r.at("s2").join(nodeA)
		s3 := r.members["s3"].srv
		r.until(5*time.Second, "s3 knows where the node is", func() bool { return s3.Connected(nodeA) })
		a, _ := n.through(t.Context(), s3)
		r.kill("s2")
		if _, err := a.Recv(); cluster.CodeOf(err) != cluster.CodeUnavailable {
			t.Errorf("the server died: %v", err)
		}
	})
}

func TestModelCheckOnANodeOfAnotherServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		s3 := r.members["s3"].srv
		done := (&fleet{T: t, Server: s3}).check(t.Context()) // waits for a node
		n, _ := r.at("s1").join(nodeA)
		m := n.next().GetCall()
		stream := n.open(m.GetId())
		if err := stream.Send(&pb.AnswerChunk{Data: cluster.Marshal(&cluster.ModelVersion{Platform: "p"})}); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestArtifactOfAnotherServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		f := r.at("s1")
		r.until(5*time.Second, "the servers are connected", func() bool {
			f.Server.mu.Lock()
			defer f.Server.mu.Unlock()
			for _, p := range f.Server.peers {
				if p.acked.IsZero() {
					return false
				}
			}
			return len(f.Server.peers) == 2
		})
		get := func(digest string, offset int64) (data []byte, size int64, err error) {
			stream, err := f.client().Artifact(t.Context(), &pb.ArtifactRequest{Digest: digest, Offset: offset})
			if err != nil {
				return nil, 0, err
			}
			for {
				c, err := stream.Recv()
				if err != nil {
					return data, size, err
				}
				data, size = append(data, c.Data...), size+c.Size
			}
		}
		for _, server := range []string{"s1", "s2", "s3"} {
			data, size, err := get("only-"+server, 1)
			if !errors.Is(err, io.EOF) || string(data) != server[1:] || size != int64(len(server)) {
				t.Errorf("what %s has: %q of %d, %v", server, data, size, err)
			}
		}
		if _, _, err := get("nobody's", 0); status.Code(err) != codes.NotFound {
			t.Errorf("what nobody has: %v", err)
		}
		r.kill("s3")
		if _, _, err := get("only-s3", 0); status.Code(err) != codes.Unavailable {
			t.Errorf("what a dead server has: %v", err)
		}
	})
}

// TestStatusThroughALaggingServer: a server that does not know an allocation yet
// neither drops what its node says of it, nor takes a word for another node's.
func TestStatusThroughALaggingServer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		n, _ := r.at("s2").join(nodeA)
		r.at("s1").join(nodeB)
		r.change(func() { r.members["s2"].lags = true })
		mine, theirs := r.place("mine", nodeA), r.place("theirs", nodeB)
		if r.members["s2"].state.Snapshot().Alloc(nil, mine) != nil {
			t.Fatal("the server does not lag")
		}
		n.report(1, cluster.AllocClientRunning, mine, theirs, "nobody's")
		if ack := n.next().GetAck(); ack.GetSeq() != 1 {
			t.Errorf("ack %v", ack)
		}
		snap := r.any().state.Snapshot()
		if got := snap.Alloc(nil, mine).ClientStatus; got != cluster.AllocClientRunning {
			t.Errorf("the node's allocation is %s", got)
		}
		if got := snap.Alloc(nil, theirs).ClientStatus; got != cluster.AllocClientPending {
			t.Errorf("another node's allocation is %s", got)
		}
	})
}

// TestLaggingServerTellsNothingOld: a node that moves to a server which lags must
// not be told to forget what runs.
func TestLaggingServerTellsNothingOld(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		n, _ := r.at("s1").join(nodeA)
		time.Sleep(time.Second)
		r.change(func() { r.members["s3"].lags = true })
		id := r.place("a", nodeA)
		if d := n.desired(); allocOf(t, d).ID != id {
			t.Fatal("the placement did not come")
		}
		n.cancel()
		moved := r.at("s3").dial(nodeA, 1)
		if moved.next().GetWelcome() == nil {
			t.Fatal("no welcome")
		}
		got := make(chan *pb.ServerMessage, 1)
		go func() { got <- moved.next() }()
		select {
		case m := <-got:
			t.Fatalf("a server that lags said %v", m)
		case <-time.After(3 * time.Second):
		}
		r.change(func() { r.members["s3"].lags = false })
		if d := (<-got).GetDesired(); !d.GetFull() || allocOf(t, d).ID != id {
			t.Errorf("once it has caught up: %v", d)
		}
	})
}

// TestNodeReturnsToReplacedWork: what was replaced while the node was away is ended
// there, and the rest runs on.
func TestNodeReturnsToReplacedWork(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 3, nil)
		s := r.attach(4)
		away, other := s.NodeIDs()[0], s.NodeIDs()[1]
		lost := r.place("a", away)
		r.until(5*time.Second, "it runs", func() bool { return s.Stats().Running == 1 })
		time.Sleep(6 * time.Second)
		s.Silence(away, true)
		r.until(6*time.Second, "the node is down", func() bool { return r.count(cluster.NodeStatusDown) == 1 })
		f := &fleet{T: t, store: &memStore{apply: r.any().Apply, state: r.any().state}}
		old := r.any().state.Snapshot().Alloc(nil, lost)
		r.must(&cluster.UpdateEvals{Evals: []*cluster.Evaluation{{ID: "again", Namespace: old.Namespace, JobID: old.JobID, Type: cluster.JobTypeService, Status: cluster.EvalStatusPending}}})
		replacement := *old
		replacement.ID, replacement.NodeID, replacement.PreviousAllocation, replacement.EvalID = "replacement", other, lost, "again"
		f.plan("again", &cluster.Plan{
			Stop:  []*cluster.AllocStop{{AllocID: lost, DesiredStatus: cluster.AllocDesiredStop, ClientStatus: cluster.AllocClientLost}},
			Place: []*cluster.Allocation{&replacement},
		})
		r.until(5*time.Second, "both run, since the node does not know", func() bool { return s.Stats().Running == 2 })
		s.Silence(away, false)
		r.until(5*time.Second, "one is left", func() bool { return s.Stats().Running == 1 && r.count(cluster.NodeStatusReady) == 4 })
		r.until(5*time.Second, "the servers know", func() bool {
			return r.any().state.Snapshot().Alloc(nil, "replacement").ClientStatus == cluster.AllocClientRunning
		})
		if got := r.any().state.Snapshot().Alloc(nil, lost).ClientStatus; got != cluster.AllocClientLost {
			t.Errorf("the old one is %s", got)
		}
	})
}

// TestSameNodeAgainIsNoNews attaches a node twice: the log hears of it once, and of a
// change.
func TestSameNodeAgainIsNoNews(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRegion(t, 1, nil)
		n, _ := r.at("s1").join(nodeA)
		at := r.length()
		n.cancel()
		n, _ = r.at("s1").join(nodeA)
		if kinds := r.entries(at); len(kinds) != 0 {
			t.Errorf("the second session made %v", kinds)
		}
		changed := record(nodeA)
		n.say(&pb.NodeMessage{Message: &pb.NodeMessage_Node{Node: &pb.NodeChanged{Node: cluster.Marshal(changed)}}})
		changed.Meta = map[string]string{"a": "b"}
		n.say(&pb.NodeMessage{Message: &pb.NodeMessage_Node{Node: &pb.NodeChanged{Node: cluster.Marshal(changed)}}})
		r.until(5*time.Second, "the change", func() bool { return len(r.any().state.Snapshot().Node(nil, nodeA).Meta) == 1 })
		if kinds := r.entries(at); kinds["*cluster.RegisterNode"] != 1 || len(kinds) != 1 {
			t.Errorf("a change made %v", kinds)
		}
	})
}

// TestRoutesInParts: all routes come in parts that hold together; a change makes
// only what it changed anew, and no version is marshalled twice.
func TestRoutesInParts(t *testing.T) {
	f := start(t, Config{})
	f.attach(nodeA)
	const models = 30
	for i := range models {
		f.must(&cluster.CreateModelVersion{Version: &cluster.ModelVersion{
			Model: fmt.Sprintf("m%02d", i), Digest: fmt.Sprintf("sha256:%064d", i), Size: 1, Platform: "onnxruntime_onnx",
			Properties: map[string]string{"p": strings.Repeat("x", 400<<10)},
		}})
	}
	before := f.Server.routes.now()
	parts := before.since(nil)
	if len(parts) < 3 {
		t.Errorf("%d parts", len(parts))
	}
	var names []string
	for i, p := range parts {
		if p.Full != (i == 0) || p.More != (i < len(parts)-1) {
			t.Errorf("part %d of %d: full %v, more %v", i, len(parts), p.Full, p.More)
		}
		size := 0
		for _, m := range p.Models {
			names = append(names, m.Name)
			size += len(m.Versions[0].Record)
		}
		if size > routesPart {
			t.Errorf("part %d has %d bytes", i, size)
		}
	}
	if !slices.IsSorted(names) || len(names) != models {
		t.Errorf("the parts name %v", names)
	}
	if again := f.Server.routes.now(); again != before {
		t.Error("nothing changed, but the routes were worked out again")
	}
	f.push("m07", 2)
	id := f.place("web", nodeA, nil)
	f.must(&cluster.UpdateAllocs{Allocs: []*cluster.Allocation{{ID: id, ClientStatus: cluster.AllocClientRunning, Serving: &cluster.Serving{
		Task: "x", Model: "m03", Version: 1, Address: "127.0.0.1:9", Ready: true,
	}}}})
	after := f.Server.routes.now()
	change := after.since(before)
	if len(change) != 1 || len(change[0].Models) != 2 || change[0].Full || change[0].More {
		t.Fatalf("the change makes %d parts", len(change))
	}
	for name, m := range after.models {
		old := before.models[name]
		v := len(m.message.Versions) - 1
		if same := old == m; same == (name == "m03" || name == "m07") {
			t.Errorf("model %s was kept: %v", name, same)
		}
		if &old.message.Versions[0].Record[0] != &m.message.Versions[v].Record[0] {
			t.Errorf("a version of %s was marshalled again", name)
		}
	}
	if u := f.Server.routes.now().since(after); u != nil {
		t.Errorf("no change makes %v", u)
	}
}

// TestThousandNodes attaches a thousand nodes over sockets to three servers, gives
// them work and kills a server.
func TestThousandNodes(t *testing.T) {
	r := startRegion(t, 3, true, func(c *Config) { c.TTL = 30 * time.Second }) // no machine is slow enough to miss it
	const nodes = 1000
	s := r.attach(nodes)
	for i, id := range s.NodeIDs()[:50] {
		r.place(fmt.Sprint("job", i), id)
	}
	r.until(patience, "the work runs", func() bool { return s.Stats().Running == 50 })
	r.until(patience, "and is known to run", func() bool {
		running := 0
		for _, a := range r.any().state.Snapshot().Allocs(nil, "") {
			if a.ClientStatus == cluster.AllocClientRunning {
				running++
			}
		}
		return running == 50
	})
	at := r.length()
	r.kill("s2")
	r.until(patience, "a third of the nodes has moved", func() bool {
		st := s.Stats()
		return st.Attached == nodes && st.Reconnects > 0
	})
	if kinds := r.entries(at); len(kinds) != 0 {
		t.Errorf("moving made log entries: %v", kinds)
	}
	if st := s.Stats(); st.Running != 50 || st.AckP99 == 0 || st.Acked == 0 {
		t.Errorf("%+v", st)
	}
}
