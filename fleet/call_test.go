package fleet

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

var logs = &pb.Call{Request: &pb.Call_Logs{Logs: &pb.LogsRequest{AllocId: "a", Task: "x", Type: "stdout"}}}

// called is a call under way on the servers' side.
type called struct {
	answer *Answer
	err    error
}

// call makes a call in the background and gives it together with what the node gets.
func (n *node) call(ctx context.Context, c *pb.Call) (<-chan called, *pb.Call) {
	n.Helper()
	ch := make(chan called, 1)
	go func() {
		a, err := n.Call(ctx, n.id, c)
		ch <- called{a, err}
	}()
	m := n.next()
	if m.GetCall() == nil {
		n.Fatalf("got %v, want a call", m)
	}
	return ch, m.GetCall()
}

// open begins an answer.
func (n *node) open(id string) pb.Fleet_AnswerClient {
	n.Helper()
	stream, err := n.client().Answer(n.stream.Context())
	if err != nil {
		n.Fatal(err)
	}
	if err := stream.Send(&pb.AnswerChunk{CallId: id}); err != nil {
		n.Fatal(err)
	}
	return stream
}

// answered opens the answer to a new call on both ends.
func (n *node) answered(ctx context.Context) (*Answer, pb.Fleet_AnswerClient) {
	n.Helper()
	ch, c := n.call(ctx, &pb.Call{Request: logs.Request})
	stream := n.open(c.Id)
	got := <-ch
	if got.err != nil {
		n.Fatal(got.err)
	}
	n.Cleanup(got.answer.Close)
	return got.answer, stream
}

func TestCallIsAnswered(t *testing.T) {
	f := start(t, Config{})
	n, _ := f.attach(nodeA)
	ch, c := n.call(t.Context(), &pb.Call{Request: logs.Request})
	if c.Id == "" || c.GetLogs().GetTask() != "x" {
		t.Errorf("the node got %v", c)
	}
	stream := n.open(c.Id)
	got := <-ch
	if got.err != nil {
		t.Fatal(got.err)
	}
	defer got.answer.Close()
	const chunks = 3 * answerQueue
	sent := make(chan error, 1)
	go func() {
		for i := range chunks {
			if err := stream.Send(&pb.AnswerChunk{Data: []byte{byte(i)}, Offset: int64(i)}); err != nil {
				sent <- err
				return
			}
		}
		sent <- stream.CloseSend()
	}()
	for i := range chunks {
		chunk, err := got.answer.Recv()
		if err != nil || chunk.Offset != int64(i) || !bytes.Equal(chunk.Data, []byte{byte(i)}) {
			t.Fatalf("chunk %d: %v, %v", i, chunk, err)
		}
	}
	if _, err := got.answer.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last chunk: %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("the node's stream ended with %v", err)
	}
	// Nobody else may answer it again.
	if _, err := n.open(c.Id).Recv(); status.Code(err) != codes.NotFound {
		t.Errorf("a second answer: %v", err)
	}
}

func TestCallGetsTheNodesError(t *testing.T) {
	f := start(t, Config{})
	n, _ := f.attach(nodeA)
	a, stream := n.answered(t.Context())
	if err := stream.Send(&pb.AnswerChunk{Error: &pb.Error{Code: string(cluster.CodeNotFound), Text: "no such task"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.One(); cluster.CodeOf(err) != cluster.CodeNotFound || err.Error() != "no such task" {
		t.Errorf("got %v", err)
	}
	empty, stream := n.answered(t.Context())
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := empty.One(); cluster.CodeOf(err) != cluster.CodeInternal {
		t.Errorf("an answer without data: %v", err)
	}
}

func TestBrokenAnswerIsNoEnd(t *testing.T) {
	f := start(t, Config{})
	n, _ := f.attach(nodeA)
	ch, c := n.call(t.Context(), &pb.Call{Request: logs.Request})
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := f.client().Answer(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pb.AnswerChunk{CallId: c.Id, Data: []byte("half")}); err != nil {
		t.Fatal(err)
	}
	got := <-ch
	if got.err != nil {
		t.Fatal(got.err)
	}
	defer got.answer.Close()
	if chunk, err := got.answer.Recv(); err != nil || string(chunk.Data) != "half" {
		t.Fatalf("%v, %v", chunk, err)
	}
	cancel()
	if _, err := got.answer.Recv(); cluster.CodeOf(err) != cluster.CodeUnavailable || !strings.Contains(err.Error(), "broke off") {
		t.Errorf("a broken answer gave %v", err)
	}
}

func TestNodeHearsThatNobodyListens(t *testing.T) {
	f := start(t, Config{})
	n, _ := f.attach(nodeA)
	a, idle := n.answered(t.Context())
	a.Close()
	if _, err := idle.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("closed: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	a, busy := n.answered(ctx)
	for range answerQueue + 5 { // more than anybody takes
		if err := busy.Send(&pb.AnswerChunk{Data: []byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if _, err := busy.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("cancelled: %v", err)
	}
	for err := error(nil); !errors.Is(err, context.Canceled); { // what had come before may still be read
		if _, err = a.Recv(); err != nil && !errors.Is(err, context.Canceled) {
			t.Fatalf("the caller got %v", err)
		}
	}
}

func TestCallWithoutAnswer(t *testing.T) {
	f := start(t, Config{AnswerTimeout: 10 * time.Millisecond})
	if _, err := f.Call(t.Context(), nodeA, &pb.Call{}); cluster.CodeOf(err) != cluster.CodeUnavailable {
		t.Errorf("a node that is not connected: %v", err)
	}
	n, _ := f.attach(nodeA)
	ch, c := n.call(t.Context(), &pb.Call{Request: logs.Request})
	if got := <-ch; cluster.CodeOf(got.err) != cluster.CodeUnavailable || !strings.Contains(got.err.Error(), "did not answer") {
		t.Errorf("a silent node: %v", got.err)
	}
	if _, err := n.open(c.Id).Recv(); status.Code(err) != codes.NotFound {
		t.Errorf("a late answer: %v", err)
	}
}

func TestCallEndsWithCallerAndSession(t *testing.T) {
	f := start(t, Config{AnswerTimeout: time.Hour})
	n, _ := f.attach(nodeA)
	ctx, cancel := context.WithCancel(t.Context())
	ch, _ := n.call(ctx, &pb.Call{Request: logs.Request})
	cancel()
	if got := <-ch; !errors.Is(got.err, context.Canceled) {
		t.Errorf("the caller left: %v", got.err)
	}
	ch, _ = n.call(t.Context(), &pb.Call{Request: logs.Request})
	n.cancel()
	if got := <-ch; cluster.CodeOf(got.err) != cluster.CodeUnavailable {
		t.Errorf("the node left: %v", got.err)
	}
}

func TestCallsOfANodeAreLimited(t *testing.T) {
	f := start(t, Config{})
	n, _ := f.attach(nodeA)
	var open []*Answer
	for range MaxCalls {
		a, _ := n.answered(t.Context())
		open = append(open, a)
	}
	if _, err := f.Call(t.Context(), nodeA, &pb.Call{}); cluster.CodeOf(err) != cluster.CodeUnavailable {
		t.Errorf("call %d: %v", MaxCalls+1, err)
	}
	open[0].Close()
	n.answered(t.Context())
}

func (f *fleet) push(model string, version uint64) {
	f.Helper()
	f.must(&cluster.CreateModelVersion{Version: &cluster.ModelVersion{
		Model: model, Version: version, Digest: "sha256:" + strings.Repeat("0", 63) + string(rune('0'+version)), Size: 1, Platform: "onnxruntime_onnx",
	}})
}

func TestRoutes(t *testing.T) {
	f := start(t, Config{})
	f.attach(nodeA)
	f.push("fashion", 1)
	f.push("other", 1)
	stream, err := f.client().Routes(t.Context(), &pb.RoutesRequest{Gateway: "g"})
	if err != nil {
		t.Fatal(err)
	}
	next := func() *pb.RoutesUpdate {
		t.Helper()
		u, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	if u := next(); !u.Full || len(u.Models) != 2 || u.Models[0].Name != "fashion" || len(u.Models[0].Versions) != 1 || u.Index == 0 {
		t.Errorf("first update %v", u)
	}
	id := f.place("web", nodeA, nil) // serves nothing yet: no news for gateways
	serving := &cluster.Serving{Task: "x", Model: "fashion", Version: 1, Address: "127.0.0.1:9", Ready: true}
	f.must(&cluster.UpdateAllocs{Allocs: []*cluster.Allocation{{ID: id, ClientStatus: cluster.AllocClientRunning, Serving: serving}}})
	u := next()
	if u.Full || len(u.Models) != 1 || len(u.Models[0].Versions[0].Endpoints) != 1 {
		t.Fatalf("a replica: %v", u)
	}
	if e := u.Models[0].Versions[0].Endpoints[0]; e.AllocId != id || e.NodeId != nodeA || e.Address != serving.Address || !e.Ready {
		t.Errorf("endpoint %v", e)
	}
	f.must(&cluster.SetAlias{Model: "fashion", Alias: "production", Version: 1})
	if u = next(); len(u.Models) != 1 || !maps.Equal(u.Models[0].Aliases, map[string]uint64{"production": 1}) {
		t.Errorf("an alias: %v", u)
	}
	f.must(&cluster.UpdateAllocs{Allocs: []*cluster.Allocation{{ID: id, ClientStatus: cluster.AllocClientFailed}}})
	if u = next(); len(u.Models) != 1 || len(u.Models[0].Versions[0].Endpoints) != 0 {
		t.Errorf("a failed replica: %v", u)
	}
	f.store.restore(cluster.NewState())
	if u = next(); !u.Full || len(u.Models) != 0 {
		t.Errorf("after a restore: %v", u)
	}
	f.push("third", 1)
	if u = next(); u.Full || len(u.Models) != 1 || u.Models[0].Name != "third" {
		t.Errorf("after it: %v", u)
	}
}

// bytesOf serves one artifact.
type bytesOf map[string][]byte

func (b bytesOf) Open(_ context.Context, digest string, offset int64) (io.ReadCloser, int64, error) {
	data, ok := b[digest]
	if !ok {
		return nil, 0, cluster.Errorf(cluster.CodeNotFound, "no artifact %s", digest)
	}
	if digest == "broken" {
		return io.NopCloser(io.MultiReader(bytes.NewReader(data), brokenReader{})), int64(len(data)) + 1, nil
	}
	return io.NopCloser(bytes.NewReader(data[offset:])), int64(len(data)), nil
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) {
	return 0, cluster.Errorf(cluster.CodeUnavailable, "the disk is gone")
}

func TestArtifact(t *testing.T) {
	data := make([]byte, 2*artifactChunk+100)
	_, _ = rand.Read(data)
	f := start(t, Config{Blobs: bytesOf{"d": data, "empty": nil, "broken": data[:10]}})
	for _, c := range []struct {
		digest string
		offset int64
		want   []byte
		code   codes.Code
	}{
		{"d", 0, data, codes.OK},
		{"d", artifactChunk + 7, data[artifactChunk+7:], codes.OK},
		{"d", int64(len(data)), nil, codes.OK},
		{"empty", 0, nil, codes.OK},
		{"none", 0, nil, codes.NotFound},
		{"broken", 0, data[:10], codes.Unavailable},
	} {
		stream, err := f.client().Artifact(t.Context(), &pb.ArtifactRequest{Digest: c.digest, Offset: c.offset})
		if err != nil {
			t.Fatal(err)
		}
		var got []byte
		var sizes []int64
		chunk, err := stream.Recv()
		for ; err == nil; chunk, err = stream.Recv() {
			if len(chunk.Data) > artifactChunk {
				t.Errorf("a chunk of %d bytes", len(chunk.Data))
			}
			got, sizes = append(got, chunk.Data...), append(sizes, chunk.Size)
		}
		if c.code == codes.OK && !errors.Is(err, io.EOF) || c.code != codes.OK && status.Code(err) != c.code {
			t.Errorf("%s from %d: %v, want %s", c.digest, c.offset, err, c.code)
		}
		if !bytes.Equal(got, c.want) && c.code == codes.OK {
			t.Errorf("%s from %d: %d bytes, want %d", c.digest, c.offset, len(got), len(c.want))
		}
		if c.code == codes.OK && (sizes[0] != int64(len(f.cfg.Blobs.(bytesOf)[c.digest])) || slices.Max(append(sizes[1:], 0)) != 0) {
			t.Errorf("%s: sizes %v", c.digest, sizes)
		}
	}
}

// check makes a model check in the background.
func (f *fleet) check(ctx context.Context) <-chan error {
	ch := make(chan error, 1)
	go func() {
		v, err := f.CheckModel(ctx, "sha256:1", 1)
		if err == nil && v.Platform != "p" {
			err = errors.New("the check gave another record than the node")
		}
		ch <- err
	}()
	return ch
}

func TestCheckModelWaitsForANode(t *testing.T) {
	f := start(t, Config{CheckWait: patience})
	done := f.check(t.Context())
	n, _ := f.attach(nodeA)
	m := n.next().GetCall()
	if r := m.GetCheckModel(); r.GetDigest() != "sha256:1" || r.GetSize() != 1 {
		t.Fatalf("the node got %v", m)
	}
	stream := n.open(m.Id)
	if err := stream.Send(&pb.AnswerChunk{Data: cluster.Marshal(&cluster.ModelVersion{Platform: "p"})}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	// What is wrong with a model is the answer, not a reason to ask on.
	done = f.check(t.Context())
	stream = n.open(n.next().GetCall().GetId())
	if err := stream.Send(&pb.AnswerChunk{Error: &pb.Error{Code: string(cluster.CodeInvalid), Text: "not a model"}}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; cluster.CodeOf(err) != cluster.CodeInvalid || err.Error() != "not a model" {
		t.Errorf("a bad model: %v", err)
	}
}

func TestCheckModelGivesUp(t *testing.T) {
	f := start(t, Config{CheckWait: time.Millisecond})
	if err := <-f.check(t.Context()); cluster.CodeOf(err) != cluster.CodeUnavailable {
		t.Errorf("no node: %v", err)
	}
}

func TestCheckModelAsksAnotherNode(t *testing.T) {
	f := start(t, Config{CheckWait: patience})
	n, _ := f.attach(nodeA)
	done := f.check(t.Context())
	n.next() // it takes the call and dies
	other, _ := f.attach(nodeB)
	n.cancel()
	stream := other.open(other.next().GetCall().GetId())
	if err := stream.Send(&pb.AnswerChunk{Data: cluster.Marshal(&cluster.ModelVersion{Platform: "p"})}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
