package agent

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/pki"
)

// Files of a worker in its task's secrets directory.
const (
	workerCert = "worker.pem"
	workerKey  = "worker-key.pem"
	workerCA   = "worker-ca.pem"
)

const (
	// reintroduceEvery bounds how often a node that the servers do not know any more
	// tries its introduction token.
	reintroduceEvery = 30 * time.Second
	// signWait bounds the wait of a new worker for a server to sign its certificate.
	signWait = 30 * time.Second
	signPoll = 100 * time.Millisecond
	// Bounds of the pause between looks at the workers' certificates.
	minCertPause = 200 * time.Millisecond
	maxCertPause = time.Minute
	// workerJitter spreads the renewals of workers over this share of a life.
	workerJitter = 1. / 12
)

// introduce makes sure that the node has a certificate before it speaks to servers.
func (a *Agent) introduce(ctx context.Context) error {
	if a.holder == nil {
		return nil
	}
	return a.holder.Ensure(ctx)
}

// reintroduce enrols again a node whose certificate the servers refuse although it
// is valid: it was purged. That needs an introduction token that it has not used.
func (a *Agent) reintroduce(ctx context.Context, refusal error) {
	if a.holder == nil || status.Code(refusal) != codes.PermissionDenied || !a.holder.Valid() || time.Since(a.reintroduced) < reintroduceEvery {
		return
	}
	a.reintroduced = time.Now()
	if err := a.holder.Enroll(ctx); err != nil && ctx.Err() == nil {
		a.log.Error("the servers refuse this node and it could not be introduced again", "refusal", refusal, "error", err)
	}
}

// workerTLS gives the workers on this node their certificates.
type workerTLS struct{ a *Agent }

// Certify implements task.WorkerTLS. A certificate that is not due yet is left as it
// is, so that workers start while no server is there; one that is due and cannot be
// renewed now is used for as long as it is valid.
func (w workerTLS) Certify(ctx context.Context, allocID, dir string) (args []string, err error) {
	return w.certify(ctx, allocID, dir, true)
}

// certify is Certify; wait says whether to wait for a server where there is no valid
// certificate.
func (w workerTLS) certify(ctx context.Context, allocID, dir string, wait bool) (args []string, err error) {
	cert, keyFile, ca := filepath.Join(dir, workerCert), filepath.Join(dir, workerKey), filepath.Join(dir, workerCA)
	own := w.a.holder.Material()
	if err := pki.CopyIfChanged(own.CAFile(), ca); err != nil {
		return nil, err
	}
	key, err := pki.EnsureKey(keyFile)
	if err != nil {
		return nil, err
	}
	args = []string{"-tls-cert", cert, "-tls-key", keyFile, "-tls-ca", ca, "-tls-node", w.a.nodeID}
	old := w.kept(cert, allocID, key)
	if old != nil && !pki.Due(old, renewShare(allocID), time.Now()) {
		return args, nil
	}
	chain, err := w.sign(ctx, allocID, key, wait && old == nil)
	if err == nil {
		err = pki.Replace(cert, pki.EncodeChain(chain), pki.ModeKey)
	}
	if err != nil && old != nil {
		w.a.log.Warn("the certificate of a worker could not be renewed", "alloc", allocID, "left", time.Until(old.NotAfter).Round(time.Second), "error", err)
		return args, nil
	}
	return args, err
}

// renewShare is the share of a certificate's life after which it is renewed.
func renewShare(allocID string) float64 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(allocID)) // never fails
	return pki.RenewServingAt + workerJitter*float64(h.Sum32()%1000)/1000
}

// kept gives the certificate in a file if it is the allocation's, for this key, and valid.
func (w workerTLS) kept(file, allocID string, key crypto.Signer) *x509.Certificate {
	certs, err := pki.ReadCerts(file)
	if err != nil || w.check(certs, allocID, key) != nil {
		return nil
	}
	return certs[0]
}

func (w workerTLS) check(certs []*x509.Certificate, allocID string, key crypto.Signer) error {
	_, err := w.a.holder.Material().Verify(certs, pki.Exactly(pki.RoleWorker, allocID), x509.ExtKeyUsageServerAuth, time.Now())
	if err == nil && pki.KeyHash(certs[0].PublicKey) != pki.KeyHash(key.Public()) {
		err = errors.New("it is for another key")
	}
	return err
}

// sign has a server sign a certificate; wait: for a bounded time until one is connected.
func (w workerTLS) sign(ctx context.Context, allocID string, key crypto.Signer, wait bool) ([][]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, signWait)
	defer cancel()
	csr, err := pki.NewCSR(key)
	if err != nil {
		return nil, err
	}
	var client pb.FleetClient
	for {
		w.a.mu.Lock()
		client = w.a.client
		w.a.mu.Unlock()
		if client != nil {
			break
		}
		if !wait {
			return nil, errors.New("no server is connected")
		}
		select {
		case <-time.After(signPoll):
		case <-ctx.Done():
			return nil, fmt.Errorf("no server is connected that could sign it: %w", ctx.Err())
		}
	}
	c, err := client.SignWorker(ctx, &pb.SignWorkerRequest{Csr: csr, AllocId: allocID})
	if err != nil {
		return nil, err
	}
	certs, err := pki.ParseChain(c.Chain)
	if err == nil {
		err = w.check(certs, allocID, key)
	}
	if err != nil {
		return nil, fmt.Errorf("the server's answer: %w", err)
	}
	return c.Chain, nil
}

// keepWorkersCertified renews the certificates of the workers that run, until ctx
// ends. Workers take them over by themselves.
func (a *Agent) keepWorkersCertified(ctx context.Context) {
	for {
		pause := maxCertPause
		for _, w := range a.workers() {
			if _, err := (workerTLS{a}).certify(ctx, w.alloc, w.dir, false); err != nil && ctx.Err() == nil {
				a.log.Error("a worker's certificate could not be renewed and is not valid any more", "alloc", w.alloc, "error", err)
			}
			pause = min(pause, w.due())
		}
		select {
		case <-time.After(max(pause, minCertPause)):
		case <-a.certified:
		case <-ctx.Done():
			return
		}
	}
}

// certified is a worker that runs with a certificate.
type certified struct{ alloc, dir string }

// due is how long its certificate needs no look: until it is due, or after an
// attempt in vain for a hundredth of its life.
func (c certified) due() time.Duration {
	certs, err := pki.ReadCerts(filepath.Join(c.dir, workerCert))
	if err != nil {
		return maxCertPause
	}
	return max(time.Until(pki.DueTime(certs[0], renewShare(c.alloc))), pki.Life(certs[0])/100)
}

// workers lists the workers that run with certificates.
func (a *Agent) workers() (all []certified) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range a.runners {
		r.mu.Lock()
		for name, t := range r.local.Tasks {
			dir := r.dir.Task(name).Secrets()
			if t.Run == nil || !t.Run.TLS {
				continue
			}
			if _, err := os.Stat(dir); err == nil {
				all = append(all, certified{r.id, dir})
			}
		}
		r.mu.Unlock()
	}
	return all
}
