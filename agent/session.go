package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/rxvision/rxvision/blob"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// The wire to the servers.
const (
	protocolVersion = 1
	maxMessage      = 8 << 20
	batchWindow     = 50 * time.Millisecond // status changes of this time go together
	helloWait       = 15 * time.Second      // for the server's Welcome
	minBackoff      = 200 * time.Millisecond
	maxBackoff      = 2 * time.Second // below the TTL, also with its jitter: servers that come back count who stays away as down
	maxTTL          = time.Hour
	connectTimeout  = 5 * time.Second
	keepAlive       = 10 * time.Second // finds a server that froze; the shortest that gRPC allows
)

// connect keeps a stream to some server until ctx ends. Which server is drawn, so
// that a fleet spreads; after a failure it is another's turn.
func (a *Agent) connect(ctx context.Context) {
	pause := minBackoff
	var order []int
	for ctx.Err() == nil {
		if len(order) == 0 {
			order = rand.Perm(len(a.cfg.Servers))
		}
		address := a.cfg.Servers[order[0]]
		order = order[1:]
		welcomed, err := a.session(ctx, address)
		if ctx.Err() != nil {
			return
		}
		if welcomed {
			pause = minBackoff
		}
		a.log.Warn("no connection to a server; tasks run on", "server", address, "error", err, "retry_in", pause)
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, maxBackoff)
	}
}

// dial gives the connection to a server, which all of the agent's streams share.
func (a *Agent) dial(address string) (*grpc.ClientConn, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.conns[address]; c != nil {
		return c, nil
	}
	options := append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepAlive, Timeout: keepAlive / 2, PermitWithoutStream: true}),
		grpc.WithConnectParams(grpc.ConnectParams{ // by itself gRPC would come to wait for two minutes
			Backoff:           backoff.Config{BaseDelay: minBackoff, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxBackoff},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
	}, a.cfg.DialOptions...)
	c, err := grpc.NewClient("passthrough:///"+address, options...)
	if err != nil {
		return nil, err
	}
	a.conns[address] = c
	return c, nil
}

// session is one stream: hello, then status and heartbeats one way, desired state
// and calls the other. welcomed says whether the server took us.
func (a *Agent) session(ctx context.Context, address string) (welcomed bool, err error) {
	conn, err := a.dial(address)
	if err != nil {
		return false, err
	}
	client := pb.NewFleetClient(conn)
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	stream, err := client.Attach(ctx)
	if err != nil {
		return false, err
	}
	hello := &pb.Hello{Protocol: protocolVersion, Node: cluster.Marshal(a.nodeRecord()), Session: newUUID()}
	if err := stream.Send(&pb.NodeMessage{Message: &pb.NodeMessage_Hello{Hello: hello}}); err != nil {
		return false, streamError(stream, err)
	}
	late := time.AfterFunc(helloWait, func() { cancel(errors.New("the server did not answer hello")) })
	first, err := stream.Recv()
	if !late.Stop() || err != nil {
		return false, errors.Join(err, context.Cause(ctx))
	}
	welcome := first.GetWelcome()
	if welcome == nil {
		return false, errors.New("the server's first message is not welcome")
	}
	ttl := time.Duration(welcome.TtlMs) * time.Millisecond
	if ttl <= 0 || ttl > maxTTL {
		return false, fmt.Errorf("the server names a TTL of %s", ttl)
	}
	a.log.Info("attached to server", "server", welcome.Server, "address", address, "ttl", ttl)
	a.connected(client)
	defer a.connected(nil)
	a.updates.newStream()
	calls := &calls{agent: a, client: client, slots: make(chan struct{}, maxCalls)}
	wg.Go(func() {
		if err := a.send(ctx, stream, ttl/3); err != nil {
			cancel(err)
		}
	})
	defer calls.wg.Wait()
	defer cancel(nil)
	for {
		m, err := stream.Recv()
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return true, err
		}
		switch m := m.Message.(type) {
		case *pb.ServerMessage_Desired:
			if err := a.desire(m.Desired); err != nil {
				return true, err
			}
		case *pb.ServerMessage_Ack:
			a.updates.ack(m.Ack.Seq)
		case *pb.ServerMessage_Call:
			calls.take(ctx, m.Call)
		}
	}
}

// send is the stream's one sender.
func (a *Agent) send(ctx context.Context, stream pb.Fleet_AttachClient, every time.Duration) error {
	beat := time.NewTicker(every)
	defer beat.Stop()
	for {
		var m pb.NodeMessage
		select {
		case <-ctx.Done():
			return nil
		case <-beat.C:
			m.Message = &pb.NodeMessage_Heartbeat{Heartbeat: &pb.Heartbeat{}}
		case <-a.nodeChanged:
			m.Message = &pb.NodeMessage_Node{Node: &pb.NodeChanged{Node: cluster.Marshal(a.nodeRecord())}}
		case <-a.updates.wake:
			select {
			case <-time.After(batchWindow):
			case <-ctx.Done():
				return nil
			}
			seq, records := a.updates.next()
			if records == nil {
				continue
			}
			m.Message = &pb.NodeMessage_Allocs{Allocs: &pb.AllocUpdates{Seq: seq, Allocs: records}}
		}
		if err := stream.Send(&m); err != nil {
			return streamError(stream, err)
		}
	}
}

// streamError gives the reason behind a Send that says only EOF.
func streamError(stream pb.Fleet_AttachClient, err error) error {
	if errors.Is(err, io.EOF) {
		_, err = stream.Recv()
	}
	return err
}

// connected remembers the client to fetch artifacts through, nil: none.
func (a *Agent) connected(client pb.FleetClient) {
	a.mu.Lock()
	a.client = client
	a.mu.Unlock()
	v := 0.0
	if client != nil {
		v = 1
	}
	a.metrics.connected.Set(v)
}

// fetch streams an artifact from the server that the agent is attached to, or
// else from any that answers.
func (a *Agent) fetch(ctx context.Context, d blob.Digest, offset int64) (io.ReadCloser, error) {
	a.mu.Lock()
	clients := []pb.FleetClient{a.client}
	a.mu.Unlock()
	if clients[0] == nil {
		clients = nil
		for _, i := range rand.Perm(len(a.cfg.Servers)) {
			if conn, err := a.dial(a.cfg.Servers[i]); err == nil {
				clients = append(clients, pb.NewFleetClient(conn))
			}
		}
	}
	errs := []error{errors.New("no server could be reached")}
	for _, c := range clients {
		ctx, cancel := context.WithCancel(ctx)
		stream, err := c.Artifact(ctx, &pb.ArtifactRequest{Digest: d.String(), Offset: offset})
		if err == nil {
			var first *pb.ArtifactChunk
			if first, err = stream.Recv(); err == nil {
				return &artifactReader{stream: stream, rest: first.Data, cancel: cancel}, nil
			}
		}
		cancel()
		errs = append(errs, err)
	}
	return nil, errors.Join(errs[min(1, len(errs)-1):]...)
}

// artifactReader reads the chunks of an artifact stream.
type artifactReader struct {
	stream pb.Fleet_ArtifactClient
	rest   []byte
	cancel context.CancelFunc
}

func (r *artifactReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		c, err := r.stream.Recv()
		if err != nil {
			return 0, err
		}
		r.rest = c.Data
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *artifactReader) Close() error { r.cancel(); return nil }
