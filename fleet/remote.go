package fleet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/pki"
)

// remoteLimit bounds one attempt to get a certificate from one server.
const remoteLimit = 15 * time.Second

// Remote gets certificates from whichever server answers: a pki.Remote for the
// Holder of a node or gateway.
type Remote struct {
	Servers  []string // host:port of the listeners that agents and gateways dial
	Role     pki.Role
	Name     string // node ID, or the gateway's name
	NodeName string // of a node
	// Token gives the introduction token, anew for each attempt to enrol, since
	// whoever runs the host may bring another one.
	Token func() (string, error)
}

// Enroll implements pki.Remote.
func (r *Remote) Enroll(ctx context.Context, wire *tls.Config, csr []byte) ([][]byte, error) {
	token, err := r.Token()
	if err != nil {
		return nil, err
	}
	return r.ask(ctx, wire, func(ctx context.Context, c pb.FleetClient) (*pb.Certificate, error) {
		return c.Enroll(ctx, &pb.EnrollRequest{Token: token, Csr: csr, Role: string(r.Role), Name: r.Name, NodeName: r.NodeName})
	})
}

// Renew implements pki.Remote.
func (r *Remote) Renew(ctx context.Context, wire *tls.Config, csr []byte, expired [][]byte) ([][]byte, error) {
	return r.ask(ctx, wire, func(ctx context.Context, c pb.FleetClient) (*pb.Certificate, error) {
		return c.Renew(ctx, &pb.RenewRequest{Csr: csr, Expired: expired})
	})
}

// ask asks one server after the other until one answers or refuses.
func (r *Remote) ask(ctx context.Context, wire *tls.Config, call func(context.Context, pb.FleetClient) (*pb.Certificate, error)) ([][]byte, error) {
	if len(r.Servers) == 0 {
		return nil, errors.New("no server is named")
	}
	var faults []error
	for _, i := range rand.Perm(len(r.Servers)) {
		chain, err := r.askOne(ctx, r.Servers[i], wire, call)
		if err == nil {
			return chain, nil
		}
		faults = append(faults, fmt.Errorf("server %s: %s", r.Servers[i], status.Convert(err).Message()))
		switch status.Code(err) {
		case codes.PermissionDenied, codes.FailedPrecondition, codes.InvalidArgument, codes.Unimplemented:
			return nil, faults[len(faults)-1] // another would say the same
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(faults...)
}

func (r *Remote) askOne(ctx context.Context, address string, wire *tls.Config, call func(context.Context, pb.FleetClient) (*pb.Certificate, error)) ([][]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, remoteLimit)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(wire)))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	cert, err := call(ctx, pb.NewFleetClient(conn))
	if err != nil {
		return nil, err
	}
	return cert.Chain, nil
}
