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
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/rxvision/rxvision/blob"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/pki"
)

// The wire to the servers.
const (
	protocolVersion = 1
	maxMessage      = 8 << 20
	batchWindow     = 50 * time.Millisecond // status changes of this time go together
	helloWait       = 4 * time.Second       // for the server's Welcome, when nobody misses the node yet …
	quickHello      = time.Second           // … and when servers do; doubled with each attempt in vain
	maxHelloWait    = 15 * time.Second
	minBackoff      = 100 * time.Millisecond
	maxBackoff      = 5 * time.Second // known to the servers, which await whom they have not heard of since a restart
	steady          = 5 * time.Second // a session that lasted this long was good: the next is sought at once
	redial          = time.Second     // between a connection's own attempts
	maxTTL          = time.Hour
	connectTimeout  = 5 * time.Second
	keepAlive       = 10 * time.Second // finds a server that froze; the shortest that gRPC allows
)

// connect keeps a stream to some server until ctx ends. Which server is drawn, so
// that a fleet spreads. When a good session breaks, another server is tried at once,
// within a jitter; attempts in vain come ever later, so that servers that refuse
// are not stormed.
func (a *Agent) connect(ctx context.Context) {
	var order []int
	var at attempt
	last := -1
	for ctx.Err() == nil {
		if len(order) == 0 {
			order = rand.Perm(len(a.cfg.Servers))
			if order[0] == last { // the one that just failed comes last
				order = append(order[1:], last)
			}
		}
		last, order = order[0], order[1:]
		address := a.cfg.Servers[last]
		served, err := a.session(ctx, address, &at)
		if ctx.Err() != nil {
			return
		}
		if served >= steady {
			at.tries, order = 0, nil
		}
		a.reintroduce(ctx, err)
		wait := at.pause()
		at.tries++
		a.log.Warn("no connection to a server; tasks run on", "server", address, "error", err, "retry_in", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// attempt is how urgent the next attempt to attach is.
type attempt struct {
	tries int           // attempts in vain before it
	ttl   time.Duration // as a server last named it: it misses the node after that; 0: none ever did
}

// pause is how long to wait before the next attempt: soon enough that the servers
// do not miss a node which could come.
func (t attempt) pause() time.Duration {
	if t.tries == 0 {
		return rand.N(minBackoff)
	}
	most := maxBackoff
	if t.ttl > 0 {
		most = max(min(most, t.ttl/2), minBackoff)
	}
	pause := min(minBackoff<<min(t.tries, 10), most)
	return pause/2 + rand.N(pause/2)
}

// patience is how long to wait for a server's welcome.
func (t attempt) patience() time.Duration {
	first := helloWait
	if t.ttl > 0 {
		first = quickHello
	}
	return min(first<<min(t.tries, 10), maxHelloWait)
}

// dial gives the connection to a server, which all of the agent's streams share.
func (a *Agent) dial(address string) (*grpc.ClientConn, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.conns[address]; c != nil {
		return c, nil
	}
	wire := insecure.NewCredentials()
	if a.holder != nil {
		if !a.holder.Valid() { // a connection without a certificate would stay one
			return nil, errors.New("this node has no valid certificate")
		}
		wire = credentials.NewTLS(a.holder.Material().Client(pki.Only(pki.RoleServer)))
	}
	options := append([]grpc.DialOption{
		grpc.WithTransportCredentials(wire),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepAlive, Timeout: keepAlive / 2, PermitWithoutStream: true}),
		grpc.WithConnectParams(grpc.ConnectParams{ // by itself gRPC would come to wait for two minutes
			Backoff:           backoff.Config{BaseDelay: minBackoff, Multiplier: 1.6, Jitter: 0.2, MaxDelay: redial},
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
// and calls the other. served says how long it was of use: since the first desired
// state was taken over.
func (a *Agent) session(ctx context.Context, address string, at *attempt) (served time.Duration, err error) {
	if err := a.introduce(ctx); err != nil {
		return 0, err
	}
	conn, err := a.dial(address)
	if err != nil {
		return 0, err
	}
	client := pb.NewFleetClient(conn)
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	// One timer stands behind every wait for the server: a frozen one must not hold
	// the node for longer than the servers wait for it.
	watch := time.AfterFunc(at.patience(), func() { cancel(errSilent) })
	defer watch.Stop()
	stream, err := client.Attach(ctx)
	if err != nil {
		return 0, reason(ctx, err)
	}
	hello := &pb.Hello{
		Protocol: protocolVersion, Node: cluster.Marshal(a.nodeRecord()), Session: newUUID(),
		Any: at.tries >= len(a.cfg.Servers),
	}
	hello.Timeline, hello.Known = a.knows()
	if err := stream.Send(&pb.NodeMessage{Message: &pb.NodeMessage_Hello{Hello: hello}}); err != nil {
		return 0, reason(ctx, streamError(stream, err))
	}
	first, err := stream.Recv()
	if !watch.Stop() || err != nil {
		return 0, reason(ctx, err)
	}
	welcome := first.GetWelcome()
	if welcome == nil {
		return 0, errors.New("the server's first message is not welcome")
	}
	ttl, err := ttlOf(welcome)
	if err != nil {
		return 0, err
	}
	at.ttl = ttl
	a.log.Info("attached to server", "server", welcome.Server, "address", address, "ttl", ttl)
	a.connected(client)
	defer a.connected(nil)
	a.updates.newStream()
	calls := &calls{agent: a, client: client, slots: make(chan struct{}, maxCalls)}
	ttls := make(chan time.Duration, 1)
	wg.Go(func() {
		if err := a.send(ctx, stream, ttl, ttls); err != nil {
			cancel(err)
		}
	})
	defer calls.wg.Wait()
	defer cancel(nil)
	defer func() { a.pulse.end(time.Now()) }()
	var since time.Time
	defer func() {
		if !since.IsZero() {
			served = time.Since(since)
		}
	}()
	for {
		if welcome.Answers {
			watch.Reset(a.pulse.patience(ttl)) // a heartbeat is answered in less
		}
		m, err := stream.Recv()
		watch.Stop()
		if err != nil {
			return 0, reason(ctx, err)
		}
		switch m := m.Message.(type) {
		case *pb.ServerMessage_Desired:
			if err := a.desire(m.Desired); err != nil {
				return 0, err
			}
			if since.IsZero() {
				since = time.Now()
			}
		case *pb.ServerMessage_Heartbeat:
			a.pulse.end(time.Now())
		case *pb.ServerMessage_Ack:
			a.updates.ack(m.Ack.Seq)
		case *pb.ServerMessage_Call:
			calls.take(ctx, m.Call)
		case *pb.ServerMessage_Welcome:
			if ttl, err = ttlOf(m.Welcome); err != nil {
				return 0, err
			}
			at.ttl = ttl
			select { // the sender wants the newest only
			case <-ttls:
			default:
			}
			ttls <- ttl
		}
	}
}

// errSilent ends a session whose server may hang: another one may do better.
var errSilent = errors.New("the server says nothing")

// reason is why a session ended: its own cause, if it has one, and not what
// cancelling it looks like.
func reason(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

func ttlOf(w *pb.Welcome) (time.Duration, error) {
	ttl := time.Duration(w.TtlMs) * time.Millisecond
	if ttl < time.Millisecond || ttl > maxTTL {
		return 0, fmt.Errorf("the server names a TTL of %s", ttl)
	}
	return ttl, nil
}

// send is the stream's one sender.
func (a *Agent) send(ctx context.Context, stream pb.Fleet_AttachClient, ttl time.Duration, ttls <-chan time.Duration) error {
	beat := time.NewTicker(ttl / 4)
	defer beat.Stop()
	measure := time.NewTicker(sampleEvery)
	defer measure.Stop()
	for {
		var m pb.NodeMessage
		select {
		case <-ctx.Done():
			return nil
		case ttl := <-ttls:
			beat.Reset(ttl / 4)
			continue
		case <-beat.C:
			a.pulse.beat(time.Now())
			m.Message = &pb.NodeMessage_Heartbeat{Heartbeat: &pb.Heartbeat{}}
		case now := <-measure.C:
			samples := a.samples(now)
			if len(samples) == 0 {
				continue
			}
			m.Message = &pb.NodeMessage_Samples{Samples: &pb.Samples{Samples: samples}}
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
